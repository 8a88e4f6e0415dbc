-- All of these commands, or none: only while the lease KEYS[1] reads ARGV[1]. Each is the number of its words, and they.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
local at = 2
while at <= #ARGV do
  local words = tonumber(ARGV[at])
  redis.call(unpack(ARGV, at + 1, at + words))
  at = at + words + 1
end
return 1
