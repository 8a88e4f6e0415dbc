-- Charge the buckets, or none. ARGV: request_id, {epoch, lease in µs} as doubles, memo, names of the charges' buckets,
-- charges. The answer is doubles: 1 if green and else 0, then room and reset of each charge; or for a denial -index of
-- the charge named and the wait in microseconds (-1: none is known), then room and reset.

local request_id, memo, names = ARGV[1], ARGV[3], ARGV[4]
local epoch, lease_us = struct_unpack('<dd', ARGV[2])
local counts, blob = ARGV[5], ARGV[6]
local FIRST_METER = 7
local count = #blob / CHARGE_BYTES

local function doubles(numbers)
  return struct_pack('<' .. string.rep('d', #numbers), unpack(numbers))
end

-- numbers, and room and reset of each charge after them; resets takes the resets.
local function answer_with(numbers, buckets, resets)
  local n = #numbers
  for i = 1, count do
    local bucket = buckets[i]
    resets[i] = reset_us(bucket)
    numbers[n + 1], numbers[n + 2] = remaining(bucket), resets[i]
    n = n + 2
  end
  return doubles(numbers)
end

-- How much of a bucket a charge may fill. In two parts, because capacity * C_BORROW_UP_TO may not be exact.
local function capacity_for(bucket, charge)
  local capacity, borrow_up_to = bucket[CAPACITY], charge[C_BORROW_UP_TO]
  if borrow_up_to == THOUSANDTHS then
    return capacity
  end
  local rest = capacity % THOUSANDTHS
  return (capacity - rest) / THOUSANDTHS * borrow_up_to + floor(rest * borrow_up_to / THOUSANDTHS)
end

local function ticks_to_leak(bucket, level)
  return min(ceil(level / bucket[RATE]), LONGEST_WAIT_US / bucket[KIND])
end

local function told_at_us(bucket, charge, capacity, short)
  local kind = bucket[KIND]
  if kind < 0 then
    local window_us = -kind * 1000000
    return bucket[TICK] + min(ceil(short / bucket[CAPACITY]), floor(LONGEST_WAIT_US / window_us)) * window_us
  end
  local exact, due = bucket[TICK] + ticks_to_leak(bucket, short), bucket[DUE]
  local next_in_line = due > 0 and due + ticks_to_leak(bucket, min(charge[C_COST], capacity) * units(kind)) or 0
  return (exact < next_in_line and next_in_line <= exact + SPREAD_US / kind and next_in_line or exact) * kind
end

-- How long a charge must wait; nil where it fits.
local function told_wait_us(bucket, charge)
  local cost, kind = charge[C_COST], bucket[KIND]
  local capacity = capacity_for(bucket, charge)
  local short = max(0, bucket[LEVEL] - (capacity - min(cost, capacity)) * units(kind))
  if capacity == 0 and (cost > 0 or (short > 0 and kind < 0)) then
    return NEVER
  elseif short == 0 then
    return nil
  elseif kind == GAUGE then
    return UNTOLD
  end
  return told_at_us(bucket, charge, capacity, short) - now_us
end

-- Whether the request is green; for a denial also the charge named, the one that made the promise, and the wait.
local function decide(buckets, charges)
  local plain, plain_wait, assured, assured_wait, shared, shared_wait
  local has_assured, has_pool = false, false
  for i = 1, count do
    local role = charges[i][C_ROLE]
    has_assured, has_pool = has_assured or role == ASSURED, has_pool or role == POOL
    local wait = role ~= COUNTED and told_wait_us(buckets[i], charges[i])
    if not wait then
      -- it fits
    elseif role == PLAIN then
      if not plain or wait > plain_wait then
        plain, plain_wait = i, wait
      end
    elseif role == ASSURED then
      if not assured or wait > assured_wait then
        assured, assured_wait = i, wait
      end
    elseif not shared or wait > shared_wait then
      shared, shared_wait = i, wait
    end
  end
  local green = not assured and (has_assured or not has_pool)
  if not green and shared then
    local first, wait = shared, shared_wait
    if assured and assured_wait <= wait then
      first, wait = assured, assured_wait
    end
    if not plain or wait > plain_wait then
      return false, assured or shared, first, wait
    end
  end
  return green, plain, plain, plain_wait
end

-- Whoever is refused after this one is told a time after the room promised to it here.
local function promise(scope, bucket, charge, at_us)
  local kind, begins = bucket[KIND], string.sub(scope, #SCOPE + 1, #SCOPE + 2)
  if kind > 0 and (begins == KEY_SCOPE or begins == ORG_SCOPE) then
    local debt = max(0, charge[C_COST] - capacity_for(bucket, charge)) * units(kind)
    bucket[DUE] = floor(at_us / kind) + ticks_to_leak(bucket, debt)
    bucket[WAITING] = bucket[WAITING] + 1
  end
end

-- Charges the buckets in place; the holds, as a reservation stores them.
local function charge_all(buckets, charges, green)
  local holds, n = {}, 0
  for i = 1, count do
    local charge, bucket = charges[i], buckets[i]
    local held, at_reap = -1, 0
    local role, cost, kind = charge[C_ROLE], charge[C_COST], charge[C_KIND]
    if role ~= ASSURED or green then
      shift(bucket, cost * units(kind))
      if kind > 0 and cost > 0 and not (green and role == CEILING) then
        bucket[WAITING] = max(0, bucket[WAITING] - 1)
        bucket[DUE] = bucket[WAITING] > 0 and bucket[DUE] or 0
      end
      held, at_reap = cost, charge[C_AT_REAP]
    end
    holds[n + 1], holds[n + 2], holds[n + 3], holds[n + 4] = held, at_reap, bucket[TICK], kind
    n = n + 4
  end
  return doubles(holds)
end

local due = redis_call('ZRANGEBYSCORE', LEASES, '-inf', format('%d', now_us), 'LIMIT', 0, REAPED_PER_ADMIT)
if #due > 0 then
  reap(due)
end
local known = redis_call('GET', RESERVATION_KEY)
if known then
  local phase, forget_us, holds = struct_unpack('<ddd', known)
  if phase == SETTLED and forget_us <= now_us then
    known = nil
  elseif holds >= 0 then
    return string.sub(known, 33, 32 + (2 * holds + 1) * 8)
  end
end

-- Both in the order of the call; places are the order of the scopes.
local charges, buckets, places, kept_until, scopes = {}, {}, {}, {}, #counts / 8
for scope = 1, scopes do
  local first = #places
  local last = first + struct_unpack('<d', counts, scope * 8 - 7)
  local meters = FIRST_METER + first
  local found = redis_call('HMGET', KEYS[FIRST_SCOPE + scope - 1], UNTIL, unpack(ARGV, meters, FIRST_METER + last - 1))
  kept_until[scope] = found[1]
  for i = first + 1, last do
    local charge = {struct_unpack(CHARGE_FORMAT, blob, (i - 1) * CHARGE_BYTES + 1)}
    local bucket, place = current(found[i - first + 1], charge), charge[C_PLACE]
    adopt(bucket, charge, epoch)
    places[i], charges[place], buckets[place] = place, charge, bucket
  end
end
if known then -- settled before it was admitted: it has paid
  return answer_with({0}, buckets, {})
end

local function scope_of(place)
  local i = 0
  for scope = 1, scopes do
    for _ = 1, struct_unpack('<d', counts, scope * 8 - 7) do
      i = i + 1
      if places[i] == place then
        return KEYS[FIRST_SCOPE + scope - 1]
      end
    end
  end
end

local green, named, promised, wait = decide(buckets, charges)
local answer, resets = nil, {}
if named then
  if wait == NEVER then
    wait = UNTOLD
  elseif wait ~= UNTOLD then
    promise(scope_of(promised), buckets[promised], charges[promised], now_us + wait)
  end
  answer = answer_with({-named, wait}, buckets, resets)
else
  local holds = charge_all(buckets, charges, green)
  answer = answer_with({green and 1 or 0}, buckets, resets)
  local record = struct_pack('<dddd', OPEN, 0, count, #names) .. answer .. holds .. names .. memo
  redis_call('SET', RESERVATION_KEY, record, 'PX', format('%d', lease_us / 1000 + KEPT_UNREAPED_MS))
  redis_call('ZADD', LEASES, format('%d', now_us + lease_us), request_id)
end

local i = 0
for scope = 1, scopes do
  local fields, n, unused_us, key = {}, 0, 0, KEYS[FIRST_SCOPE + scope - 1]
  for _ = 1, struct_unpack('<d', counts, scope * 8 - 7) do
    local place = places[i + 1]
    fields[n + 1], fields[n + 2] = ARGV[FIRST_METER + i], packed(buckets[place])
    unused_us = max(unused_us, resets[place])
    i, n = i + 1, n + 2
  end
  redis_call('HSET', key, unpack(fields))
  keep_scope(key, kept_until[scope], unused_us)
end
return answer
