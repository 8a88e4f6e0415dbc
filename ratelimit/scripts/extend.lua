-- Hold these amounts from now on, and renew the lease. {request_id, usage, lease_ms} -> 1, or 0 where the request is
-- unknown or settled.

local request_id, usage, lease_ms = unpack(call)
local key = KEYS[3]
local record = known_reservation(key)
if not record or record[PHASE] == SETTLED then
  return 0
end
local holds = record[HOLDS]
if record[PHASE] == REAPED then
  shift_gauges(holds, 1)
end
for _, charge in ipairs(usage) do
  local hold = hold_of(holds, charge)
  if hold then
    correct(charge, hold)
    hold[H_HELD], hold[H_AT_REAP] = charge[COST], charge[AT_REAP]
  end
end
record[PHASE] = OPEN
redis_call('SET', key, pack(record), 'PX', lease_ms + KEPT_UNREAPED_MS)
lease(request_id, now_us + lease_ms * 1000)
save_changed()
return 1
