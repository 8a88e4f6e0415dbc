-- Correct the hold to what was used and give gauges back. {request_id, usage, record} -> 1, or 0 where it was settled
-- before.

local request_id, usage, usage_record = unpack(call)
local key = KEYS[3]
local record = known_reservation(key)
if record and record[PHASE] == SETTLED then
  return 0
end
if record then
  if record[PHASE] == OPEN then
    shift_gauges(record[HOLDS], -1)
  end
  for _, charge in ipairs(usage) do
    local hold = charge[KIND] ~= GAUGE and hold_of(record[HOLDS], charge)
    if hold then
      correct(charge, hold)
    end
  end
else
  for _, charge in ipairs(usage) do
    if charge[KIND] ~= GAUGE then
      charge_unasked(charge, charge[COST])
    end
  end
end
local settled = {SETTLED, now_us + TOMBSTONE_US, '', record and record[ANSWER] or {}, {}}
redis_call('SET', key, pack(settled), 'PX', TOMBSTONE_US / 1000)
redis_call('ZREM', LEASES, request_id)
if usage_record ~= '' then
  record_usage('record', usage_record)
end
save_changed()
return 1
