-- Take or renew the lease by which at most one controller leads.
-- KEYS: the lease ("TERM HOLDER"), the newest term, the installation that this Redis belongs to. ARGV: who asks, the
-- term that it leads (0: none), the newest term that it has heard of, the length of the lease in ms, its installation,
-- and the other one that it was told of before, if any. Answers the term in force (0: none), 1 if it is the asker's,
-- and the other installation that keeps the asker out, if one does.
local lease, newest, installation = KEYS[1], KEYS[2], KEYS[3]
local holder, term, heard, lease_ms, ours, other = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5], ARGV[6]
local owner = redis.call('GET', installation)
if not owner and other ~= '' and not redis.call('GET', newest) then
  -- Redis has lost everything. Whoever it did not belong to leaves it to the one that fills it again.
  owner = other
end
if owner and owner ~= ours then
  return {0, 0, owner}
end
local found = redis.call('GET', lease)
if found and found == term .. ' ' .. holder then
  redis.call('PEXPIRE', lease, lease_ms)
  redis.call('SET', installation, ours)
  return {tonumber(term), 1, ''}
end
local of, by = string.match(found or '', '^(%d+) (.+)$')
-- A lease that never ends is nobody's: a key that was restored by hand, or is damaged, would keep everybody out.
local taken = by and by ~= holder and redis.call('PTTL', lease) > 0
-- Whoever led and does not any more takes no new term at once: it has to lay down its work first.
if taken or term ~= '0' then
  return {taken and tonumber(of) or 0, 0, ''}
end
local next = math.max(tonumber(redis.call('GET', newest)) or 0, heard) + 1
local told = string.format('%.0f', next)
redis.call('SET', newest, told)
redis.call('SET', lease, told .. ' ' .. holder, 'PX', lease_ms)
redis.call('SET', installation, ours)
return {next, 1, ''}
