-- Charge every bucket, or none. {request_id, charges, epoch, lease_ms} -> {remaining, reset_us}, and for a denial also
-- the binding charge's index (from 0) and the wait in microseconds (-1: none is known).

local request_id, charges, epoch, lease_ms = unpack(call)

-- Index and wait of the bucket that denies; nil where every cost fits.
local function binding(buckets)
  local index, longest = nil, -2
  for i, charge in ipairs(charges) do
    local bucket, wait = buckets[i], nil
    local short = shortfall(bucket, charge)
    if bucket.capacity == 0 and charge[COST] > 0 then
      wait = EXACT
    elseif short > 0 and bucket.rate > 0 then
      wait = leak_time_us(bucket, charge, short)
    elseif short > 0 then
      wait = -1
    end
    if wait and wait > longest then
      index, longest = i, wait
    end
  end
  if longest == EXACT then
    longest = -1
  end
  return index, longest
end

local function current(keys)
  local buckets = {}
  for i, charge in ipairs(charges) do
    buckets[i] = leaked(stored(charge, keys[i]), charge)
    adopt(buckets[i], charge, epoch)
  end
  return buckets
end

local function hold(room, reset)
  local rated, gauges = {}, {}
  for _, charge in ipairs(charges) do
    local held = charge[RATE] > 0 and rated or gauges
    held[charge[BUCKET]] = charge[COST]
  end
  reserve(request_id, {OPEN, room, reset, rated, gauges})
  lease(request_id, lease_ms)
end

reap(REAPED_PER_ADMIT)
local known = reservation(request_id)
if known and (#known[REMAINING] > 0 or #charges == 0) then
  return pack({known[REMAINING], known[RESET_US]})
end

local keys = bucket_keys(charges)
local buckets = current(keys)
if known then -- settled before it was admitted: it has paid
  return pack({readings(buckets, charges)})
end
local index, wait = binding(buckets)
if not index then
  for i, charge in ipairs(charges) do
    buckets[i].level = shifted(buckets[i].level, charge[COST] * units(charge))
  end
end
local room, reset = readings(buckets, charges)
if not index then
  hold(room, reset)
end
for i, charge in ipairs(charges) do
  keep(buckets[i], charge, keys[i])
end
if index then
  return pack({room, reset, index - 1, wait})
end
return pack({room, reset})
