-- What every script begins with: the clock, the keys, and the rules of ratelimit/meter.py in Lua.
--
-- store.py puts the constants MINUTE_US, EXACT, LONGEST_WAIT_US, TOMBSTONE_US, REAPED_PER_ADMIT, NO_EPOCH and
-- OPEN, REAPED, SETTLED above this text, taken from meter.py.
--
-- KEYS     reservations (hash), leases and tombstones (sorted sets by deadline), gauges (hash), then one key for each
--          rated bucket, in the order of the charges.
-- ARGV[1]  the call, as MessagePack. A charge is {bucket, cost, capacity, rate, tick_us}.
-- Stored   a bucket is {level, tick, rate, capacity, epoch}, a reservation {phase, remaining, reset_us, rated, gauges}.
--
-- Every number is an integer below 2^53, which cmsgpack packs as an integer, whole. Of two such, floor(a / b) and
-- ceil(a / b) are exact: the rounding of a / b is less than 1 / b, the least distance to an integer it does not reach.

local RESERVATIONS, LEASES, TOMBSTONES, GAUGES = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local FIRST_BUCKET = 5
-- How long a bucket is kept once it is empty, so that rounding can never drop a level that is not.
local KEPT_EMPTY_MS = 60000
local BUCKET, COST, CAPACITY, RATE, TICK_US = 1, 2, 3, 4, 5
local PHASE, REMAINING, RESET_US, RATED, HELD_GAUGES = 1, 2, 3, 4, 5

local pack, unpack_one = cmsgpack.pack, cmsgpack.unpack
local floor, ceil, min, max = math.floor, math.ceil, math.min, math.max

local time = redis.call('TIME')
local now_us = tonumber(time[1]) * 1000000 + tonumber(time[2])
local call = unpack_one(ARGV[1])

local function number(value)
  return string.format('%.0f', value)
end

local function units(charge)
  if charge[RATE] == 0 then
    return 1
  end
  return MINUTE_US / charge[TICK_US]
end

-- The bucket at now_us. elapsed * rate may exceed 2^53 and be rounded, but then it exceeds every level.
local function leaked(stored, charge)
  local tick = floor(now_us / charge[TICK_US])
  if not stored then
    return {level = 0, tick = tick, rate = charge[RATE], capacity = charge[CAPACITY], epoch = NO_EPOCH}
  end
  local level, stored_tick, rate, capacity, epoch = unpack(unpack_one(stored))
  local elapsed = max(0, tick - stored_tick)
  return {
    level = max(0, level - elapsed * rate),
    tick = stored_tick + elapsed,
    rate = rate,
    capacity = capacity,
    epoch = epoch,
  }
end

local function adopt(bucket, charge, epoch)
  if epoch > bucket.epoch then
    bucket.rate, bucket.capacity, bucket.epoch = charge[RATE], charge[CAPACITY], epoch
  end
end

local function shortfall(bucket, charge)
  return max(0, bucket.level - (bucket.capacity - min(charge[COST], bucket.capacity)) * units(charge))
end

local function leak_time_us(bucket, charge, amount)
  local ticks = min(ceil(amount / bucket.rate), LONGEST_WAIT_US / charge[TICK_US])
  return (bucket.tick + ticks) * charge[TICK_US] - now_us
end

local function shifted(level, amount)
  return min(max(level + amount, 0), EXACT - 1)
end

local function remaining(bucket, charge)
  local per_token = units(charge)
  return floor(max(0, bucket.capacity * per_token - bucket.level) / per_token)
end

local function reset_us(bucket, charge)
  if bucket.level == 0 or bucket.rate == 0 then
    return 0
  end
  return leak_time_us(bucket, charge, bucket.level)
end

local function readings(buckets, charges)
  local room, reset = {}, {}
  for i, charge in ipairs(charges) do
    room[i] = remaining(buckets[i], charge)
    reset[i] = reset_us(buckets[i], charge)
  end
  return room, reset
end

local function packed(bucket)
  return pack({bucket.level, bucket.tick, bucket.rate, bucket.capacity, bucket.epoch})
end

-- Rated buckets expire some time after they are empty. Gauges have no such time: a gauge at 0 says nothing and goes.
local function keep(bucket, charge, key)
  if charge[RATE] > 0 then
    local empty_ms = ceil(max(0, reset_us(bucket, charge)) / 1000)
    redis.call('SET', key, packed(bucket), 'PX', number(empty_ms + KEPT_EMPTY_MS))
  elseif bucket.level > 0 then
    redis.call('HSET', GAUGES, charge[BUCKET], packed(bucket))
  else
    redis.call('HDEL', GAUGES, charge[BUCKET])
  end
end

local function stored(charge, key)
  if charge[RATE] > 0 then
    return redis.call('GET', key)
  end
  return redis.call('HGET', GAUGES, charge[BUCKET])
end

-- The key of each rated charge; a gauge has none.
local function bucket_keys(charges)
  local keys, following = {}, FIRST_BUCKET
  for i, charge in ipairs(charges) do
    if charge[RATE] > 0 then
      keys[i] = KEYS[following]
      following = following + 1
    end
  end
  return keys
end

-- Charge or refund without asking. A bucket that is not stored has nothing to refund.
local function shift(charge, key, amount)
  if amount == 0 then
    return
  end
  local found = stored(charge, key)
  if not found and amount < 0 then
    return
  end
  local bucket = leaked(found, charge)
  bucket.level = shifted(bucket.level, amount * units(charge))
  keep(bucket, charge, key)
end

local function shift_gauges(gauges, sign)
  for name, held in pairs(gauges) do
    shift({name, 0, 0, 0, 1}, nil, sign * held)
  end
end

local function reservation(request_id)
  local found = redis.call('HGET', RESERVATIONS, request_id)
  return found and unpack_one(found)
end

local function reserve(request_id, record)
  redis.call('HSET', RESERVATIONS, request_id, pack(record))
end

local function lease(request_id, lease_ms)
  redis.call('ZADD', LEASES, number(now_us + lease_ms * 1000), request_id)
end

local function bury(request_id)
  redis.call('ZADD', TOMBSTONES, number(now_us + TOMBSTONE_US), request_id)
end

local function due(deadlines, most)
  local ids = redis.call('ZRANGEBYSCORE', deadlines, '-inf', number(now_us), 'LIMIT', 0, most)
  if #ids > 0 then
    redis.call('ZREM', deadlines, unpack(ids))
  end
  return ids
end

-- End reservations whose lease is over, forget as many old ones; how many were ended.
local function reap(most)
  local forgotten = due(TOMBSTONES, most)
  if #forgotten > 0 then
    redis.call('HDEL', RESERVATIONS, unpack(forgotten))
  end
  local ended = due(LEASES, most)
  for _, request_id in ipairs(ended) do
    local record = reservation(request_id)
    if record then -- a server that evicts keys may have dropped it: then there is nothing to give back
      shift_gauges(record[HELD_GAUGES], -1)
      record[PHASE] = REAPED
      reserve(request_id, record)
      bury(request_id)
    end
  end
  return #ended
end
