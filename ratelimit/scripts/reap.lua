-- End reservations whose lease is over, forget those reaped long ago. {most} -> how many were ended.

local ended = reap(call[1])
save_changed()
return ended
