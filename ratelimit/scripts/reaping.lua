-- End reservations whose lease is over, and forget those reaped long ago; how many it did.

local function forget(request_id, key, record)
  local held = {}
  for _, hold in ipairs(record.ordered) do
    if hold[OF_KIND] ~= GAUGE and hold[HELD] >= 0 then
      held[#held + 1] = {string.sub(hold[H_SCOPE], #SCOPE + 1) .. ':' .. hold[H_METER], hold[HELD]}
    end
  end
  record_usage('expired', record.memo, 'held', cmsgpack.pack(held))
  redis_call('DEL', key)
  redis_call('ZREM', LEASES, request_id)
end

local function finish(request_id, key, record)
  shift_gauges(record, -1)
  for _, hold in ipairs(record.ordered) do
    if hold[OF_KIND] ~= GAUGE and hold[HELD] >= 0 then
      refund(hold, hold[HELD] - hold[AT_REAP])
      hold[HELD] = hold[AT_REAP]
    end
  end
  record.phase = REAPED
  save_reservation(key, record, REAPED_KEPT_US / 1000)
  lease(request_id, now_us + REAPED_KEPT_US)
end

for _, request_id in ipairs(due) do
  local key = CELL .. 'r:' .. request_id
  local record = load_reservation(key)
  if not record then -- a server that evicts keys may have dropped it: then there is nothing to give back
    redis_call('ZREM', LEASES, request_id)
  elseif record.phase == REAPED then
    forget(request_id, key, record)
  else
    finish(request_id, key, record)
  end
end
return #due
