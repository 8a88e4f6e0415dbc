-- The life of a reservation (ratelimit/cell.py).
--
-- Stored   the doubles phase, forget_us, number of holds n (-1: never admitted) and length of their names; if it was
--          admitted, the answer (2n + 1 doubles); the holds (HOLD_FORMAT each), their names ("scope:meter", a newline after each) and
--          the memo. A hold of -1 is of a bucket that was not charged.

local HEAD_FORMAT, HEAD_BYTES, HOLD_FORMAT, HOLD_BYTES = '<dddd', 32, '<dddd', 32
local HELD, AT_REAP, OPENED, OF_KIND, H_SCOPE, H_METER = 1, 2, 3, 4, 5, 6

-- {phase, answer, holds by name, names, memo}, the holds with their scopes' keys; nil where it is unknown.
local function load_reservation(key)
  local found = redis_call('GET', key)
  if not found then
    return nil
  end
  local phase, forget_us, count, names_length = struct_unpack(HEAD_FORMAT, found)
  if phase == SETTLED and forget_us <= now_us then
    return nil
  end
  local holds_at = HEAD_BYTES + (2 * count + 1) * 8
  if count < 0 then
    count, holds_at = 0, HEAD_BYTES
  end
  local names_at = holds_at + count * HOLD_BYTES
  local names = string.sub(found, names_at + 1, names_at + names_length)
  local holds, ordered, i = {}, {}, 0
  for scope, meter in string.gmatch(names, '([^\n]+):([^:\n]+)\n') do
    local hold = {struct_unpack(HOLD_FORMAT, found, holds_at + i * HOLD_BYTES + 1)}
    hold[H_SCOPE], hold[H_METER] = SCOPE .. scope, meter
    i = i + 1
    ordered[i], holds[hold[H_SCOPE] .. ':' .. meter] = hold, hold
  end
  return {
    phase = phase,
    answer = string.sub(found, HEAD_BYTES + 1, holds_at),
    holds = holds,
    ordered = ordered,
    names = names,
    memo = string.sub(found, names_at + names_length + 1),
  }
end

local function save_reservation(key, record, lease_ms)
  local parts = {struct_pack(HEAD_FORMAT, record.phase, 0, #record.ordered, #record.names), record.answer}
  for i, hold in ipairs(record.ordered) do
    parts[i + 2] = struct_pack(HOLD_FORMAT, unpack(hold, 1, 4))
  end
  parts[#parts + 1] = record.names
  parts[#parts + 1] = record.memo
  redis_call('SET', key, table.concat(parts), 'PX', format('%d', lease_ms + KEPT_UNREAPED_MS))
end

local function lease(request_id, deadline_us)
  redis_call('ZADD', LEASES, format('%d', deadline_us), request_id)
end

local function record_usage(...)
  redis_call('XADD', USAGE, 'MAXLEN', '~', TRIM_USAGE_TO, '*', ...)
end

local function save_bucket(key, meter, bucket, kept_until)
  redis_call('HSET', key, meter, packed(bucket))
  keep_scope(key, kept_until, reset_us(bucket))
end

local function charge_unasked(key, meter, charge, amount)
  if amount > 0 then
    local found = redis_call('HMGET', key, meter, UNTIL)
    local bucket = current(found[1], charge)
    shift(bucket, amount * units(charge[C_KIND]))
    save_bucket(key, meter, bucket, found[2])
  end
end

-- Give back to a bucket that is stored. A window that has opened since gives back what it took over, and no more.
local function refund(hold, amount)
  local found = amount > 0 and redis_call('HMGET', hold[H_SCOPE], hold[H_METER], UNTIL)
  if found and found[1] then
    local bucket = current(found[1])
    if bucket[KIND] < 0 and bucket[TICK] ~= hold[OPENED] then
      amount = min(amount, bucket[DUE])
      bucket[DUE] = bucket[DUE] - amount
    end
    shift(bucket, -amount * units(bucket[KIND]))
    save_bucket(hold[H_SCOPE], hold[H_METER], bucket, found[2])
  end
end

-- Take or give back what a request has in flight; a gauge that was lost has nothing to give back.
local function shift_gauges(record, sign)
  for _, hold in ipairs(record.ordered) do
    if hold[OF_KIND] == GAUGE then
      local found = redis_call('HMGET', hold[H_SCOPE], hold[H_METER], UNTIL)
      if found[1] or sign > 0 then
        local gauge = current(found[1], {0, 0, 0, GAUGE, PLAIN})
        shift(gauge, sign * hold[HELD])
        save_bucket(hold[H_SCOPE], hold[H_METER], gauge, found[2])
      end
    end
  end
end

-- Charge what is more than held, or give back what is less.
local function correct(key, meter, charge, hold)
  if charge[C_COST] >= hold[HELD] then
    charge_unasked(key, meter, charge, charge[C_COST] - hold[HELD])
  else
    refund(hold, hold[HELD] - charge[C_COST])
  end
end
