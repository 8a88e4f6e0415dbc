-- Charge the buckets, or none. ARGV: request_id, {epoch, lease in µs} as doubles, memo, names of the charges' buckets,
-- charges. The answer is doubles: 1 if green and else 0, then room and reset of each charge; or for a denial -index of
-- the charge named and the wait in microseconds (-1: none is known), then room and reset.
--
-- The rules of rules.lua stand here once more, within two loops over the charges: functions and tables took a fifth of
-- an admission. Only a refusal, which must name whoever waits longest, goes the long way (decide).

local request_id, memo, names = ARGV[1], ARGV[3], ARGV[4]
local epoch, lease_us = struct_unpack('<dd', ARGV[2])
local counts, blob = ARGV[5], ARGV[6]
local FIRST_METER = 7
local count, scopes = #blob / CHARGE_BYTES, #counts / 8
local C_SHORT, C_ALLOWED = 9, 10

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

-- The buckets as they are now, scope by scope.
local buckets, kept_until, lasts = {}, {}, {}
local has_assured, has_pool, plain_fits, assured_fits, shared_fits = false, false, true, true, true
local last = 0
for scope = 1, scopes do
  local before = last
  last = before + struct_unpack('<d', counts, scope * 8 - 7)
  lasts[scope] = last
  local meters = FIRST_METER + before
  local found = redis_call('HMGET', KEYS[FIRST_SCOPE + scope - 1], UNTIL, unpack(ARGV, meters, FIRST_METER + last - 1))
  kept_until[scope] = found[1]
  for i = before + 1, last do
    local at = (i - 1) * CHARGE_BYTES + 1
    local cost, limit, rate, kind, role, _, borrow_up_to = struct_unpack(CHARGE_FORMAT, blob, at)
    local per_token = kind > 0 and MINUTE_US / kind or 1
    local bucket = found[i - before + 1]
    if bucket then
      bucket = {struct_unpack(BUCKET_FORMAT, bucket)}
      local level, tick = bucket[LEVEL], bucket[TICK]
      if kind > 0 then -- elapsed * rate may exceed 2^53 and be rounded, but then it exceeds every level
        local elapsed = floor(now_us / kind) - tick
        if elapsed > 0 then
          level, tick = level - elapsed * bucket[RATE], tick + elapsed
          bucket[LEVEL], bucket[TICK] = level > 0 and level or 0, tick
        end
        if bucket[DUE] <= tick then
          bucket[DUE], bucket[WAITING] = 0, 0
        end
      elseif kind < 0 then
        local window_us = -kind * 1000000
        local windows = floor(max(0, now_us - tick) / window_us)
        level = max(0, level - windows * bucket[CAPACITY])
        if windows > 0 then
          bucket[DUE] = level
        end
        bucket[LEVEL], bucket[TICK] = level, level > 0 and tick + windows * window_us or max(tick, now_us)
      end
      if epoch >= bucket[EPOCH] then
        if kind < 0 then -- what was used within the old limit is no debt under a lower one
          local within = min(bucket[LEVEL], bucket[CAPACITY])
          bucket[LEVEL] = bucket[LEVEL] - within + min(within, limit)
        end
        bucket[RATE], bucket[CAPACITY], bucket[EPOCH] = rate, limit, epoch
      end
    else
      local level = role >= POOL and limit * per_token or 0
      bucket = {level, kind > 0 and floor(now_us / kind) or now_us, rate, limit, epoch, 0, 0, kind}
    end
    buckets[i] = bucket
    local capacity = bucket[CAPACITY]
    local allowed = capacity
    if borrow_up_to ~= THOUSANDTHS then -- in two parts, because their product may not be exact
      local rest = capacity % THOUSANDTHS
      allowed = (capacity - rest) / THOUSANDTHS * borrow_up_to + floor(rest * borrow_up_to / THOUSANDTHS)
    end
    if bucket[LEVEL] > (cost < allowed and allowed - cost or 0) * per_token or (allowed == 0 and cost > 0) then
      if role == PLAIN then
        plain_fits = false
      elseif role == ASSURED then
        assured_fits = false
      elseif role ~= COUNTED then
        shared_fits = false
      end
    end
    has_assured, has_pool = has_assured or role == ASSURED, has_pool or role == POOL
  end
end

local green = assured_fits and (has_assured or not has_pool)
local named, named_place, promised, wait
if not known and not (plain_fits and (green or shared_fits)) then
  local charges = {}
  for i = 1, count do
    local charge = {struct_unpack(CHARGE_FORMAT, blob, (i - 1) * CHARGE_BYTES + 1)}
    local allowed, borrow_up_to, kind = buckets[i][CAPACITY], charge[C_BORROW_UP_TO], charge[C_KIND]
    if borrow_up_to ~= THOUSANDTHS then -- in two parts, because their product may not be exact
      local rest = allowed % THOUSANDTHS
      allowed = (allowed - rest) / THOUSANDTHS * borrow_up_to + floor(rest * borrow_up_to / THOUSANDTHS)
    end
    local room = (allowed - min(charge[C_COST], allowed)) * (kind > 0 and MINUTE_US / kind or 1)
    charge[C_ALLOWED], charge[C_SHORT] = allowed, max(0, buckets[i][LEVEL] - room)
    charges[i] = charge
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
    local next_in_line = due > 0 and due + ticks_to_leak(bucket, min(charge[C_COST], capacity) * MINUTE_US / kind) or 0
    return (exact < next_in_line and next_in_line <= exact + SPREAD_US / kind and next_in_line or exact) * kind
  end

  -- How long a charge must wait; nil where it fits.
  local function told_wait_us(bucket, charge)
    local short, kind, allowed = charge[C_SHORT], bucket[KIND], charge[C_ALLOWED]
    if allowed == 0 and (charge[C_COST] > 0 or (short > 0 and kind < 0)) then
      return NEVER
    elseif short == 0 then
      return nil
    elseif kind == GAUGE then
      return UNTOLD
    end
    return told_at_us(bucket, charge, allowed, short) - now_us
  end

  -- Whether the request is green; for a denial also the charge named, the one that made the promise, and the wait. Of
  -- equal waits the first in the order of the call counts.
  local function decide()
    local in_order = {}
    for i = 1, count do
      in_order[charges[i][C_PLACE]] = i
    end
    local plain, plain_wait, assured, assured_wait, shared, shared_wait
    for place = 1, count do
      local i = in_order[place]
      local role = charges[i][C_ROLE]
      local told = role ~= COUNTED and told_wait_us(buckets[i], charges[i])
      if not told then
        -- it fits
      elseif role == PLAIN then
        if not plain or told > plain_wait then
          plain, plain_wait = i, told
        end
      elseif role == ASSURED then
        if not assured or told > assured_wait then
          assured, assured_wait = i, told
        end
      elseif not shared or told > shared_wait then
        shared, shared_wait = i, told
      end
    end
    local is_green = not assured and (has_assured or not has_pool)
    if not is_green and shared then
      local first, first_wait = shared, shared_wait
      if assured and assured_wait <= first_wait then
        first, first_wait = assured, assured_wait
      end
      if not plain or first_wait > plain_wait then
        return false, assured or shared, first, first_wait
      end
    end
    return is_green, plain, plain, plain_wait
  end

  green, named, promised, wait = decide()
  named_place = named and charges[named][C_PLACE]
  if named and wait == NEVER then
    wait = UNTOLD
  elseif named and wait ~= UNTOLD then
    -- Whoever is refused after this one is told a time after the room promised to it here.
    local bucket, charge = buckets[promised], charges[promised]
    local kind, scope = bucket[KIND], 1
    while promised > lasts[scope] do
      scope = scope + 1
    end
    local begins = string.sub(KEYS[FIRST_SCOPE + scope - 1], #SCOPE + 1, #SCOPE + 2)
    if kind > 0 and (begins == KEY_SCOPE or begins == ORG_SCOPE) then
      local debt = max(0, charge[C_COST] - charge[C_ALLOWED]) * MINUTE_US / kind
      bucket[DUE] = floor((now_us + wait) / kind) + ticks_to_leak(bucket, debt)
      bucket[WAITING] = bucket[WAITING] + 1
    end
  end
end

-- Charge what is admitted, and write every bucket; the room and reset of each charge, and its hold, at its place.
local admitted, written = not named and not known, not known
local told, holds, i = {}, {}, 0
for scope = 1, scopes do
  local fields, n, unused_us = {}, 0, 0
  for at = i + 1, lasts[scope] do
    local cost, _, _, _, role, at_reap, _, place = struct_unpack(CHARGE_FORMAT, blob, (at - 1) * CHARGE_BYTES + 1)
    local level, tick, rate, capacity, bucket_epoch, due_tick, waiting, kind = unpack(buckets[at])
    local per_token = kind > 0 and MINUTE_US / kind or 1
    if admitted and (green or role ~= ASSURED) then
      level = level + cost * per_token
      if level >= EXACT then
        level = EXACT - 1
      end
      if waiting > 0 and kind > 0 and cost > 0 and not (green and role == CEILING) then
        waiting = waiting - 1
        due_tick = waiting > 0 and due_tick or 0
      end
    else
      cost, at_reap = -1, 0
    end
    local room, reset = capacity * per_token - level, 0
    room = room > 0 and floor(room / per_token) or 0
    if level > 0 and kind > 0 then
      reset = (tick + min(ceil(level / rate), LONGEST_WAIT_US / kind)) * kind - now_us
    elseif level > 0 and kind < 0 then
      local window_us = -kind * 1000000
      local windows = floor(LONGEST_WAIT_US / window_us)
      if capacity > 0 then
        windows = min(ceil(level / capacity), windows)
      end
      reset = tick + windows * window_us - now_us
    end
    if reset > unused_us then
      unused_us = reset
    end
    told[2 * place - 1], told[2 * place] = room, reset
    local hold = 4 * place
    holds[hold - 3], holds[hold - 2], holds[hold - 1], holds[hold] = cost, at_reap, tick, kind
    fields[n + 1], fields[n + 2] = ARGV[FIRST_METER + at - 1],
      struct_pack(BUCKET_FORMAT, level, tick, rate, capacity, bucket_epoch, due_tick, waiting, kind)
    n = n + 2
  end
  i = lasts[scope]
  if written then
    local key, stored_until = KEYS[FIRST_SCOPE + scope - 1], kept_until[scope]
    redis_call('HSET', key, unpack(fields))
    if key ~= SCOPE .. POOL_SCOPE then
      stored_until = stored_until and struct_unpack('<d', stored_until) or 0
      if stored_until < now_us + max(KEPT_AT_LEAST_US, unused_us + MINUTE_US) then
        stored_until = now_us + max(KEPT_US, unused_us + 2 * MINUTE_US)
        redis_call('HSET', key, UNTIL, struct_pack('<d', stored_until))
        redis_call('PEXPIRE', key, format('%d', ceil((stored_until - now_us) / 1000)))
      end
    end
  end
end
local rooms_format = string.rep('dd', count)
if known then -- settled before it was admitted: it has paid
  return struct_pack('<d' .. rooms_format, 0, unpack(told))
elseif named then
  return struct_pack('<dd' .. rooms_format, -named_place, wait, unpack(told))
end
local answer = struct_pack('<d' .. rooms_format, green and 1 or 0, unpack(told))
local packed_holds = struct_pack('<' .. rooms_format .. rooms_format, unpack(holds))
local record = struct_pack('<dddd', OPEN, 0, count, #names) .. answer .. packed_holds .. names .. memo
redis_call('SET', RESERVATION_KEY, record, 'PX', format('%d', lease_us / 1000 + KEPT_UNREAPED_MS))
redis_call('ZADD', LEASES, format('%d', now_us + lease_us), request_id)
return answer
