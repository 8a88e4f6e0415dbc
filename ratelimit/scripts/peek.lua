-- The buckets as they stand, under the limits that the charges state. {charges} -> {used, remaining, reset_us} of each.

local charges = call[1]
local keys = bucket_keys(charges)
local found = {}
for i, charge in ipairs(charges) do
  local bucket = leaked(stored(charge, keys[i]), charge)
  bucket.rate, bucket.capacity = charge[RATE], charge[CAPACITY]
  found[i] = {ceil(bucket.level / units(charge)), remaining(bucket, charge), reset_us(bucket, charge)}
end
return pack(found)
