-- The rules of ratelimit/meter.py for one bucket.

-- Leaks a bucket in place. elapsed * rate may exceed 2^53 and be rounded, but then it exceeds every level.
local function leak(bucket)
  local kind, tick = bucket[KIND], bucket[TICK]
  if kind > 0 then
    local elapsed = floor(now_us / kind) - tick
    if elapsed > 0 then
      tick = tick + elapsed
      bucket[LEVEL], bucket[TICK] = max(0, bucket[LEVEL] - elapsed * bucket[RATE]), tick
    end
    if bucket[DUE] <= tick then
      bucket[DUE], bucket[WAITING] = 0, 0
    end
  elseif kind < 0 then
    local window_us = -kind * 1000000
    local windows = floor(max(0, now_us - tick) / window_us)
    bucket[LEVEL] = max(0, bucket[LEVEL] - windows * bucket[CAPACITY])
    if windows > 0 then
      bucket[DUE] = bucket[LEVEL]
    end
    bucket[TICK] = bucket[LEVEL] > 0 and tick + windows * window_us or max(tick, now_us)
  end
end

local function units(kind)
  return kind > 0 and MINUTE_US / kind or 1
end

-- The bucket as it is now, from what is stored of it. Roles POOL and COUNTED are for a pool's buckets.
local function current(found, charge)
  if found then
    local bucket = {struct_unpack(BUCKET_FORMAT, found)}
    leak(bucket)
    return bucket
  end
  local kind = charge[C_KIND]
  local level = charge[C_ROLE] >= POOL and charge[C_CAPACITY] * units(kind) or 0
  local tick = kind > 0 and floor(now_us / kind) or now_us
  return {level, tick, charge[C_RATE], charge[C_CAPACITY], NO_EPOCH, 0, 0, kind}
end

local function adopt(bucket, charge, epoch)
  if epoch >= bucket[EPOCH] then
    if bucket[KIND] < 0 then -- what was used within the old limit is no debt under a lower one
      local within = min(bucket[LEVEL], bucket[CAPACITY])
      bucket[LEVEL] = bucket[LEVEL] - within + min(within, charge[C_CAPACITY])
    end
    bucket[RATE], bucket[CAPACITY], bucket[EPOCH] = charge[C_RATE], charge[C_CAPACITY], epoch
  end
end

local function shift(bucket, amount)
  bucket[LEVEL] = min(max(bucket[LEVEL] + amount, 0), EXACT - 1)
end

local function remaining(bucket)
  local per_token = units(bucket[KIND])
  return floor(max(0, bucket[CAPACITY] * per_token - bucket[LEVEL]) / per_token)
end

local function reset_us(bucket)
  local kind, level = bucket[KIND], bucket[LEVEL]
  if level == 0 or kind == GAUGE then
    return 0
  elseif kind < 0 then
    local window_us, capacity = -kind * 1000000, bucket[CAPACITY]
    local windows = floor(LONGEST_WAIT_US / window_us)
    if capacity > 0 then
      windows = min(ceil(level / capacity), windows)
    end
    return bucket[TICK] + windows * window_us - now_us
  end
  return (bucket[TICK] + min(ceil(level / bucket[RATE]), LONGEST_WAIT_US / kind)) * kind - now_us
end

local function packed(bucket)
  return struct_pack(BUCKET_FORMAT, unpack(bucket, 1, 8))
end

-- Keep a scope until its buckets are unused, the longest of which takes unused_us; until is what was stored of that.
local function keep_scope(key, kept_until, unused_us)
  if key == SCOPE .. POOL_SCOPE then
    return
  end
  kept_until = kept_until and struct_unpack('<d', kept_until) or 0
  if kept_until < now_us + max(KEPT_AT_LEAST_US, unused_us + MINUTE_US) then
    kept_until = now_us + max(KEPT_US, unused_us + 2 * MINUTE_US)
    redis_call('HSET', key, UNTIL, struct_pack('<d', kept_until))
    redis_call('PEXPIRE', key, format('%d', ceil((kept_until - now_us) / 1000)))
  end
end

-- The charges that begin at ARGV[first], in the order of the call: {scope's key, meter, charge} each.
local function charges_from(first)
  local counts, blob, listed, i = ARGV[first], ARGV[first + 1], {}, 0
  for scope = 1, #counts / 8 do
    for _ = 1, struct_unpack('<d', counts, scope * 8 - 7) do
      local charge = {struct_unpack(CHARGE_FORMAT, blob, i * CHARGE_BYTES + 1)}
      listed[charge[C_PLACE]] = {KEYS[FIRST_SCOPE + scope - 1], ARGV[first + 2 + i], charge}
      i = i + 1
    end
  end
  return listed
end
