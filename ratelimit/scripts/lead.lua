-- Take or renew the lease by which at most one controller leads.
-- KEYS: the lease ("TERM HOLDER"), the newest term. ARGV: who asks, the term that it leads (0: none), the newest term
-- that it has heard of, the length of the lease in ms. Answers the term in force (0: none), and 1 if it is the asker's.
local lease, newest = KEYS[1], KEYS[2]
local holder, term, heard, lease_ms = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local found = redis.call('GET', lease)
if found and found == term .. ' ' .. holder then
  redis.call('PEXPIRE', lease, lease_ms)
  return {tonumber(term), 1}
end
local of, by = string.match(found or '', '^(%d+) (.+)$')
-- A lease that never ends is nobody's: a key that was restored by hand, or is damaged, would keep everybody out.
local taken = by and by ~= holder and redis.call('PTTL', lease) > 0
-- Whoever led and does not any more takes no new term at once: it has to lay down its work first.
if taken or term ~= '0' then
  return {taken and tonumber(of) or 0, 0}
end
local next = math.max(tonumber(redis.call('GET', newest)) or 0, heard) + 1
local told = string.format('%.0f', next)
redis.call('SET', newest, told)
redis.call('SET', lease, told .. ' ' .. holder, 'PX', lease_ms)
return {next, 1}
