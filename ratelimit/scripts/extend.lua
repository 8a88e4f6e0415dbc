-- Hold these amounts from now on, and renew the lease. ARGV: request_id, lease in ms, usage -> 1, or 0 where the request
-- is unknown or settled.

local request_id, lease_ms = ARGV[1], tonumber(ARGV[2])
local record = load_reservation(RESERVATION_KEY)
if not record or record.phase == SETTLED then
  return 0
end
if record.phase == REAPED then
  shift_gauges(record, 1)
end
for _, used in ipairs(charges_from(3)) do
  local key, meter, charge = unpack(used)
  local hold = record.holds[key .. ':' .. meter]
  if hold and hold[HELD] >= 0 then
    correct(key, meter, charge, hold)
    hold[HELD], hold[AT_REAP] = charge[C_COST], charge[C_AT_REAP]
  end
end
record.phase = OPEN
save_reservation(RESERVATION_KEY, record, lease_ms)
lease(request_id, now_us + lease_ms * 1000)
return 1
