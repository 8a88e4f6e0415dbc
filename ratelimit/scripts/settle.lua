-- Correct the hold to what was used and give gauges back. ARGV: request_id, usage record ('' for none), usage -> 1, or 0
-- where it was settled before.

local request_id, usage_record = ARGV[1], ARGV[2]
local record = load_reservation(RESERVATION_KEY)
if record and record.phase == SETTLED then
  return 0
end
if record and record.phase == OPEN then
  shift_gauges(record, -1)
end
for _, used in ipairs(charges_from(3)) do
  local key, meter, charge = unpack(used)
  local hold = record and record.holds[key .. ':' .. meter]
  if charge[C_KIND] == GAUGE then
    -- given back above
  elseif not record then
    charge_unasked(key, meter, charge, charge[C_COST])
  elseif hold and hold[HELD] >= 0 then
    correct(key, meter, charge, hold)
  end
end
local answer, count = record and record.answer or '', record and #record.ordered or -1
local nothing = string.rep(struct_pack(HOLD_FORMAT, -1, 0, 0, GAUGE), max(0, count))
local head = struct_pack(HEAD_FORMAT, SETTLED, now_us + TOMBSTONE_US, count, 0)
redis_call('SET', RESERVATION_KEY, head .. answer .. nothing, 'PX', format('%d', TOMBSTONE_US / 1000))
redis_call('ZREM', LEASES, request_id)
if usage_record ~= '' then
  record_usage('record', usage_record)
end
return 1
