-- Put limits in force in these buckets at once, unless theirs are of a newer epoch. ARGV: epoch, charges -> 1

for _, given in ipairs(charges_from(2)) do
  local key, meter, charge = unpack(given)
  local found = redis_call('HMGET', key, meter, UNTIL)
  local bucket = current(found[1], charge)
  adopt(bucket, charge, tonumber(ARGV[1]))
  redis_call('HSET', key, meter, packed(bucket))
  keep_scope(key, found[2], reset_us(bucket))
end
return 1
