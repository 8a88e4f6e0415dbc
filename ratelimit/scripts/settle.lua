-- Correct the hold to what was used and give gauges back. {request_id, usage} -> 1, or 0 where it was settled before.

local request_id, usage = unpack(call)
local record = reservation(request_id) or {REAPED, {}, {}, {}, {}}
if record[PHASE] == SETTLED then
  return 0
end
if record[PHASE] == OPEN then
  shift_gauges(record[HELD_GAUGES], -1)
end
local keys = bucket_keys(usage)
for i, charge in ipairs(usage) do
  if charge[RATE] > 0 then
    shift(charge, keys[i], charge[COST] - (record[RATED][charge[BUCKET]] or 0))
  end
end
reserve(request_id, {SETTLED, record[REMAINING], record[RESET_US], {}, {}})
redis.call('ZREM', LEASES, request_id)
bury(request_id)
return 1
