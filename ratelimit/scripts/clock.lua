-- What every script begins with: the keys, the formats of what is stored, and the clock.
--
-- store.py puts the constants of meter.py and cell.py in their places, and the parts that a script needs after this.
--
-- KEYS     the cell's leases (sorted set by deadline) and usage (stream), the call's reservation (of no request where
--          the call is about none), then one key for each scope. Reaping reaches the scopes that a reservation names,
--          which are in the same slot.
-- ARGV     what the script takes, then, where it takes charges: for each scope how many of the charges are its, as
--          doubles; the charges, scope by scope, as the doubles of CHARGE_FORMAT, each with its place in the call; and
--          their meters' names.
-- Stored   a scope is a hash: a meter's name to the doubles of BUCKET_FORMAT, and UNTIL to the time it is kept until.
--
-- Every number is an integer below 2^53, whole in a double. Of two such, floor(a / b) and ceil(a / b) are exact: the
-- rounding of a / b is less than 1 / b, the least distance to an integer that it does not reach.

local LEASES, USAGE, RESERVATION_KEY = KEYS[1], KEYS[2], KEYS[3]
local FIRST_SCOPE = 4
local CELL = string.sub(LEASES, 1, -#'leases' - 1)
local SCOPE = CELL .. 's:'
local UNTIL = '.until'
-- A scope is kept for a day after its last use, longer where a bucket needs it; a pool's for ever.
local KEPT_US, KEPT_AT_LEAST_US = 86400000000, 43200000000

local BUCKET_FORMAT, CHARGE_FORMAT, CHARGE_BYTES = '<dddddddd', '<dddddddd', 64
local LEVEL, TICK, RATE, CAPACITY, EPOCH, DUE, WAITING, KIND = 1, 2, 3, 4, 5, 6, 7, 8
local C_COST, C_CAPACITY, C_RATE, C_KIND, C_ROLE, C_AT_REAP, C_BORROW_UP_TO, C_PLACE = 1, 2, 3, 4, 5, 6, 7, 8

local redis_call, struct_pack, struct_unpack, format = redis.call, struct.pack, struct.unpack, string.format
local floor, ceil, min, max = math.floor, math.ceil, math.min, math.max

local time = redis_call('TIME')
local now_us = tonumber(time[1]) * 1000000 + tonumber(time[2])
