-- Charge the buckets, or none. {request_id, charges, epoch, lease_ms, memo} -> {1 if green, room and reset of each
-- charge}, or for a denial {-index of the charge named, wait in microseconds (-1: none is known), room, reset, ...}.

local request_id, charges, epoch, lease_ms, memo = unpack(call)
local NEVER, UNTOLD = EXACT, -1

local function told_at_us(bucket, short)
  local kind = bucket[B_KIND]
  if kind < 0 then
    local window_us = -kind * 1000000
    local windows = min(ceil(short / bucket[B_CAPACITY]), floor(LONGEST_WAIT_US / window_us))
    return bucket[B_TICK] + windows * window_us
  end
  local exact = bucket[B_TICK] + min(ceil(short / bucket[B_RATE]), LONGEST_WAIT_US / kind)
  if exact < bucket[B_DUE] and bucket[B_DUE] <= exact + SPREAD_US / kind then
    return bucket[B_DUE] * kind
  end
  return exact * kind
end

-- How long a charge must wait; nil where it fits.
local function told_wait_us(bucket, charge)
  local capacity, kind = floor(bucket[B_CAPACITY] * charge[BORROW_UP_TO] / THOUSANDTHS), bucket[B_KIND]
  local short = max(0, bucket[B_LEVEL] - (capacity - min(charge[COST], capacity)) * units(kind))
  if capacity == 0 and (charge[COST] > 0 or (short > 0 and kind < 0)) then
    return NEVER
  elseif short == 0 then
    return nil
  elseif kind == GAUGE then
    return UNTOLD
  end
  return told_at_us(bucket, short) - now_us
end

-- Whether the request is green; for a denial also the charge named, the one that made the promise, and the wait.
local function decide(buckets)
  local index, wait = {}, {}
  local has_assured, has_pool = false, false
  for i = 1, #charges do
    local role = charges[i][ROLE]
    has_assured, has_pool = has_assured or role == ASSURED, has_pool or role == POOL
    local told = role ~= COUNTED and told_wait_us(buckets[i], charges[i])
    if told then
      local group = role == POOL and CEILING or role
      if not index[group] or told > wait[group] then
        index[group], wait[group] = i, told
      end
    end
  end
  local green = not index[ASSURED] and (has_assured or not has_pool)
  if not green and index[CEILING] then
    local first = CEILING
    if has_assured and wait[ASSURED] <= wait[CEILING] then
      first = ASSURED
    end
    if not index[PLAIN] or wait[first] > wait[PLAIN] then
      return false, has_assured and index[ASSURED] or index[CEILING], index[first], wait[first]
    end
  end
  return green, index[PLAIN], index[PLAIN], wait[PLAIN]
end

-- Whoever is refused after this one is told a time when this one's cost has leaked away too.
local function promise(bucket, charge, at_us)
  local kind = bucket[B_KIND]
  if kind > 0 then
    local size = min(charge[COST], bucket[B_CAPACITY]) * units(kind)
    bucket[B_DUE] = floor(at_us / kind) + min(ceil(size / bucket[B_RATE]), LONGEST_WAIT_US / kind)
    bucket[B_WAITING] = bucket[B_WAITING] + 1
  end
end

local function charge_all(buckets, green)
  local holds = {}
  for i = 1, #charges do
    local charge, bucket = charges[i], buckets[i]
    if charge[ROLE] ~= ASSURED or green then
      shift(bucket, charge[COST] * units(charge[KIND]))
      bucket[B_WAITING] = max(0, bucket[B_WAITING] - 1)
      if bucket[B_WAITING] == 0 then
        bucket[B_DUE] = 0
      end
      local scope = string.sub(KEYS[charge[KEY]], #SCOPE + 1)
      holds[#holds + 1] = {scope, charge[METER], charge[COST], charge[AT_REAP], bucket[B_TICK], charge[KIND]}
    end
  end
  return holds
end

local function answering(answer, buckets)
  for i = 1, #buckets do
    answer[#answer + 1] = remaining(buckets[i])
    answer[#answer + 1] = reset_us(buckets[i])
  end
  return answer
end

if reap(REAPED_PER_ADMIT) > 0 then
  save_changed()
end
local key = KEYS[3]
local known = known_reservation(key)
local admitted_before = known and known[ANSWER]
if admitted_before and #admitted_before > 0 then
  return pack(admitted_before)
end

local buckets = {}
for i = 1, #charges do
  buckets[i] = current(charges[i])
  adopt(buckets[i], charges[i], epoch)
end
if known then -- settled before it was admitted: it has paid
  return pack(answering({0}, buckets))
end
local green, named, promised, wait = decide(buckets)
local answer, holds
if named then
  if wait == NEVER then
    wait = UNTOLD
  elseif wait ~= UNTOLD then
    promise(buckets[promised], charges[promised], now_us + wait)
  end
  answer = answering({-named, wait}, buckets)
else
  holds = charge_all(buckets, green)
  answer = answering({green and 1 or 0}, buckets)
  redis_call('SET', key, pack({OPEN, 0, memo, answer, holds}), 'PX', lease_ms + KEPT_UNREAPED_MS)
  lease(request_id, now_us + lease_ms * 1000)
end
for i = 1, #charges do
  keep(KEYS[charges[i][KEY]], buckets[i])
end
save_changed()
return pack(answer)
