-- All of these commands, or none: only while the lease KEYS[1] reads ARGV[1]. Each is the number of its words, and they.
-- With KEYS[2] and KEYS[3], the hash KEYS[2] becomes what KEYS[3] holds first, if that is ARGV[2] fields (else: -1).
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
local at = 2
if KEYS[2] then
  local fields = tonumber(ARGV[2])
  if redis.call('HLEN', KEYS[3]) ~= fields then
    return -1
  end
  redis.call('UNLINK', KEYS[2])
  if fields > 0 then
    redis.call('RENAME', KEYS[3], KEYS[2])
    redis.call('PERSIST', KEYS[2])
  end
  at = 3
end
while at <= #ARGV do
  local words = tonumber(ARGV[at])
  redis.call(unpack(ARGV, at + 1, at + words))
  at = at + words + 1
end
return 1
