-- What every script begins with: the clock, the keys, and the rules of ratelimit/meter.py in Lua.
--
-- store.py puts the constants of meter.py and cell.py, and TRIM_USAGE_TO, above this text.
--
-- KEYS     the cell's leases (sorted set by deadline) and usage (stream); then what the call names: its reservation's
--          key, and one key for each scope. Reaping reaches the scopes that a reservation names, in the same slot.
-- ARGV[1]  the call, as MessagePack. A charge is {index of its scope in KEYS, meter, cost, capacity, rate, kind, role,
--          at_reap, borrow_up_to}.
-- Stored   a scope is a list of buckets {meter, level, tick, rate, capacity, epoch, due, waiting, kind}. A reservation is
--          {phase, forget_us, memo, answer, holds}; its holds are {scope, meter, held, at_reap, opened, kind} each.
--
-- Every number is an integer below 2^53, which cmsgpack packs as an integer, whole. Of two such, floor(a / b) and
-- ceil(a / b) are exact: the rounding of a / b is less than 1 / b, the least distance to an integer it does not reach.

local LEASES, USAGE = KEYS[1], KEYS[2]
local CELL = string.sub(LEASES, 1, -#'leases' - 1)
local RESERVATION, SCOPE = CELL .. 'r:', CELL .. 's:'
-- How long a scope is kept once it is unused, so that rounding can never drop a level that is not.
local KEPT_UNUSED_MS = 60000
-- An open reservation is kept this long after its lease: far longer than reaping it takes.
local KEPT_UNREAPED_MS = 86400000

local KEY, METER, COST, CAPACITY, RATE, KIND, ROLE, AT_REAP, BORROW_UP_TO = 1, 2, 3, 4, 5, 6, 7, 8, 9
local B_METER, B_LEVEL, B_TICK, B_RATE, B_CAPACITY, B_EPOCH, B_DUE, B_WAITING, B_KIND = 1, 2, 3, 4, 5, 6, 7, 8, 9
local PHASE, FORGET_US, MEMO, ANSWER, HOLDS = 1, 2, 3, 4, 5
local H_SCOPE, H_METER, H_HELD, H_AT_REAP, H_OPENED, H_KIND = 1, 2, 3, 4, 5, 6

local pack, unpack_one = cmsgpack.pack, cmsgpack.unpack
local floor, ceil, min, max = math.floor, math.ceil, math.min, math.max
local redis_call = redis.call

local time = redis_call('TIME')
local now_us = tonumber(time[1]) * 1000000 + tonumber(time[2])
local call = unpack_one(ARGV[1])

-- Scopes read so far, by key, and the keys of those to be written.
local scopes, changed = {}, {}

local function scope_at(key)
  local scope = scopes[key]
  if not scope then
    local found = redis_call('GET', key)
    scope = found and unpack_one(found) or {}
    scopes[key] = scope
  end
  return scope
end

local function stored(key, meter)
  local scope = scope_at(key)
  for i = 1, #scope do
    if scope[i][B_METER] == meter then
      return scope[i]
    end
  end
end

local function keep(key, bucket)
  if not stored(key, bucket[B_METER]) then
    local scope = scopes[key]
    scope[#scope + 1] = bucket
  end
  changed[key] = true
end

local function units(kind)
  return kind > 0 and MINUTE_US / kind or 1
end

-- A pool's scope is where roles POOL and COUNTED are.
local function fresh(charge)
  local kind = charge[KIND]
  local level = charge[ROLE] >= POOL and charge[CAPACITY] * units(kind) or 0
  local tick = kind > 0 and floor(now_us / kind) or now_us
  return {charge[METER], level, tick, charge[RATE], charge[CAPACITY], NO_EPOCH, 0, 0, kind}
end

-- Leaks the bucket in place. elapsed * rate may exceed 2^53 and be rounded, but then it exceeds every level.
local function leak(bucket)
  local kind, tick = bucket[B_KIND], bucket[B_TICK]
  if kind > 0 then
    local elapsed = max(0, floor(now_us / kind) - tick)
    bucket[B_LEVEL], bucket[B_TICK] = max(0, bucket[B_LEVEL] - elapsed * bucket[B_RATE]), tick + elapsed
    if bucket[B_DUE] <= bucket[B_TICK] then
      bucket[B_DUE], bucket[B_WAITING] = 0, 0
    end
  elseif kind < 0 then
    local window_us = -kind * 1000000
    local windows = floor(max(0, now_us - tick) / window_us)
    bucket[B_LEVEL] = max(0, bucket[B_LEVEL] - windows * bucket[B_CAPACITY])
    bucket[B_TICK] = bucket[B_LEVEL] > 0 and tick + windows * window_us or max(tick, now_us)
  end
  return bucket
end

local function current(charge)
  local bucket = stored(KEYS[charge[KEY]], charge[METER])
  return bucket and leak(bucket) or fresh(charge)
end

local function adopt(bucket, charge, epoch)
  if epoch > bucket[B_EPOCH] then
    bucket[B_RATE], bucket[B_CAPACITY], bucket[B_EPOCH] = charge[RATE], charge[CAPACITY], epoch
  end
end

local function shift(bucket, amount)
  bucket[B_LEVEL] = min(max(bucket[B_LEVEL] + amount, 0), EXACT - 1)
end

local function remaining(bucket)
  local per_token = units(bucket[B_KIND])
  return floor(max(0, bucket[B_CAPACITY] * per_token - bucket[B_LEVEL]) / per_token)
end

local function reset_us(bucket)
  local kind, level = bucket[B_KIND], bucket[B_LEVEL]
  if level == 0 or kind == GAUGE then
    return 0
  elseif kind < 0 then
    local window_us, capacity = -kind * 1000000, bucket[B_CAPACITY]
    local windows = floor(LONGEST_WAIT_US / window_us)
    if capacity > 0 then
      windows = min(ceil(level / capacity), windows)
    end
    return bucket[B_TICK] + windows * window_us - now_us
  end
  return (bucket[B_TICK] + min(ceil(level / bucket[B_RATE]), LONGEST_WAIT_US / kind)) * kind - now_us
end

-- A pool's scope is kept for ever, and one with something in flight until that ends; any other until it is unused.
local function save_changed()
  for key in pairs(changed) do
    local scope = scopes[key]
    local unused_us, kept = 0, key == SCOPE .. POOL_SCOPE
    for i = 1, #scope do
      kept = kept or (scope[i][B_KIND] == GAUGE and scope[i][B_LEVEL] > 0)
      unused_us = max(unused_us, reset_us(scope[i]))
    end
    if kept then
      redis_call('SET', key, pack(scope))
    else
      redis_call('SET', key, pack(scope), 'PX', ceil(unused_us / 1000) + KEPT_UNUSED_MS)
    end
  end
  changed = {}
end

local function charge_unasked(charge, amount)
  if amount > 0 then
    local bucket = current(charge)
    shift(bucket, amount * units(charge[KIND]))
    keep(KEYS[charge[KEY]], bucket)
  end
end

-- Give back to a bucket that is stored, unless it is a window that has opened since.
local function refund(hold, amount)
  local key = SCOPE .. hold[H_SCOPE]
  local bucket = amount > 0 and stored(key, hold[H_METER])
  if bucket then
    leak(bucket)
    if bucket[B_KIND] >= 0 or bucket[B_TICK] == hold[H_OPENED] then
      shift(bucket, -amount * units(bucket[B_KIND]))
    end
    changed[key] = true
  end
end

-- Take or give back what a request has in flight; a gauge that was lost has nothing to give back.
local function shift_gauges(holds, sign)
  for _, hold in ipairs(holds) do
    if hold[H_KIND] == GAUGE then
      local key = SCOPE .. hold[H_SCOPE]
      local gauge = stored(key, hold[H_METER])
      if not gauge and sign > 0 then
        gauge = {hold[H_METER], 0, now_us, 0, 0, NO_EPOCH, 0, 0, GAUGE}
      end
      if gauge then
        shift(gauge, sign * hold[H_HELD])
        keep(key, gauge)
      end
    end
  end
end

-- Charge what is more than held, or give back what is less.
local function correct(charge, hold)
  if charge[COST] >= hold[H_HELD] then
    charge_unasked(charge, charge[COST] - hold[H_HELD])
  else
    refund(hold, hold[H_HELD] - charge[COST])
  end
end

local function hold_of(holds, charge)
  local scope = string.sub(KEYS[charge[KEY]], #SCOPE + 1)
  for _, hold in ipairs(holds) do
    if hold[H_METER] == charge[METER] and hold[H_SCOPE] == scope then
      return hold
    end
  end
end

-- The reservation of this call. A settled one is unknown once its time to be remembered is over.
local function known_reservation(key)
  local found = redis_call('GET', key)
  local record = found and unpack_one(found)
  if record and record[PHASE] == SETTLED and record[FORGET_US] <= now_us then
    return nil
  end
  return record
end

local function lease(request_id, deadline_us)
  redis_call('ZADD', LEASES, deadline_us, request_id)
end

local function record_usage(...)
  redis_call('XADD', USAGE, 'MAXLEN', '~', TRIM_USAGE_TO, '*', ...)
end

local function forget(request_id, key, record)
  local held = {}
  for _, hold in ipairs(record[HOLDS]) do
    if hold[H_KIND] ~= GAUGE then
      held[#held + 1] = {hold[H_SCOPE] .. ':' .. hold[H_METER], hold[H_HELD]}
    end
  end
  record_usage('expired', record[MEMO], 'held', pack(held))
  redis_call('DEL', key)
  redis_call('ZREM', LEASES, request_id)
end

local function finish(request_id, key, record)
  shift_gauges(record[HOLDS], -1)
  for _, hold in ipairs(record[HOLDS]) do
    if hold[H_KIND] ~= GAUGE then
      refund(hold, hold[H_HELD] - hold[H_AT_REAP])
      hold[H_HELD] = hold[H_AT_REAP]
    end
  end
  record[PHASE] = REAPED
  redis_call('SET', key, pack(record))
  lease(request_id, now_us + TOMBSTONE_US)
end

-- End reservations whose lease is over, forget those reaped long ago; how many were ended.
local function reap(most)
  local ended = 0
  for _, request_id in ipairs(redis_call('ZRANGEBYSCORE', LEASES, '-inf', now_us, 'LIMIT', 0, most)) do
    local key = RESERVATION .. request_id
    local found = redis_call('GET', key)
    local record = found and unpack_one(found)
    if not record then -- a server that evicts keys may have dropped it: then there is nothing to give back
      redis_call('ZREM', LEASES, request_id)
    elseif record[PHASE] == REAPED then
      forget(request_id, key, record)
    else
      finish(request_id, key, record)
      ended = ended + 1
    end
  end
  return ended
end
