-- Hold these amounts from now on, and renew the lease. {request_id, usage, lease_ms} -> 1, or 0 where the request is
-- unknown or settled.

local request_id, usage, lease_ms = unpack(call)
local record = reservation(request_id)
if not record or record[PHASE] == SETTLED then
  return 0
end
if record[PHASE] == REAPED then
  shift_gauges(record[HELD_GAUGES], 1)
  redis.call('ZREM', TOMBSTONES, request_id)
end
local keys = bucket_keys(usage)
for i, charge in ipairs(usage) do
  local held = charge[RATE] > 0 and record[RATED] or record[HELD_GAUGES]
  shift(charge, keys[i], charge[COST] - (held[charge[BUCKET]] or 0))
  held[charge[BUCKET]] = charge[COST]
end
record[PHASE] = OPEN
reserve(request_id, record)
lease(request_id, lease_ms)
return 1
