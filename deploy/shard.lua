-- For HAProxy: where the connections of a tenant belong, with REDIS_STREAM_SHARDS.

-- The shard of a tenant, as gateways and publishers compute it: CRC-16/XMODEM of the decimal text, modulo the number
-- of shards.
core.register_converters("shard", function(tenant, shards)
    local crc = 0
    for i = 1, #tenant do
        crc = crc ~ (tenant:byte(i) << 8)
        for _ = 1, 8 do
            crc = crc << 1
            if crc > 0xFFFF then crc = crc ~ 0x11021 end
        end
    end
    return crc % tonumber(shards)
end)

-- The gateway of a shard, from 0. The numbers of shards of two gateways differ by 1 at most. A gateway that is added at
-- the end of the list takes its share from those that have the most, and moves no other shard. It takes from the middle:
-- tenants with consecutive numbers fill neighbouring shards unevenly.
local function assign(shards, gateways)
    local owner, owned = {}, { [0] = shards }
    for shard = 0, shards - 1 do owner[shard] = 0 end
    for added = 1, gateways - 1 do
        owned[added] = 0
        for _ = 1, shards // (added + 1) do
            local largest = 0
            for other = 1, added - 1 do
                if owned[other] > owned[largest] then largest = other end
            end
            local its = {}
            for shard = 0, shards - 1 do
                if owner[shard] == largest then its[#its + 1] = shard end
            end
            owner[its[#its // 2 + 1]] = added
            owned[largest], owned[added] = owned[largest] - 1, owned[added] + 1
        end
    end
    return owner
end

local assigned = {}

core.register_converters("home", function(shard, shards, gateways)
    local key = shards .. "/" .. gateways
    assigned[key] = assigned[key] or assign(tonumber(shards), tonumber(gateways))
    return assigned[key][tonumber(shard)]
end)
