-- The buckets as they stand, under the limits that the charges state. {charges} -> {used, remaining, reset_us} of each.

local found = {}
for i, charge in ipairs(call[1]) do
  local bucket = current(charge)
  bucket[B_RATE], bucket[B_CAPACITY] = charge[RATE], charge[CAPACITY]
  found[i] = {ceil(bucket[B_LEVEL] / units(charge[KIND])), remaining(bucket), reset_us(bucket)}
end
return pack(found)
