-- End reservations whose lease is over, forget those reaped long ago. ARGV: most -> how many it did.

return reap(redis_call('ZRANGEBYSCORE', LEASES, '-inf', format('%d', now_us), 'LIMIT', 0, ARGV[1]))
