-- The buckets as they stand, under the limits that the charges state. ARGV: charges -> used, remaining and reset of
-- each, as doubles.

local found = {}
for _, asked in ipairs(charges_from(1)) do
  local key, meter, charge = unpack(asked)
  local bucket = current(redis_call('HGET', key, meter), charge)
  bucket[RATE], bucket[CAPACITY] = charge[C_RATE], charge[C_CAPACITY]
  local used = ceil(bucket[LEVEL] / units(charge[C_KIND]))
  found[#found + 1] = struct_pack('<ddd', used, remaining(bucket), reset_us(bucket))
end
return table.concat(found)
