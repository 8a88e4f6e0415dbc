-- Put limits in force in these buckets at once, where the epoch is newer than theirs. {charges, epoch} -> 1

local charges, epoch = unpack(call)
for _, charge in ipairs(charges) do
  local bucket = current(charge)
  adopt(bucket, charge, epoch)
  keep(KEYS[charge[KEY]], bucket)
end
save_changed()
return 1
