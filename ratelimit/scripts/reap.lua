-- End reservations whose lease is over. {most} -> how many were ended.

return reap(call[1])
