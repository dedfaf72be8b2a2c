-- For HAProxy: the shard of a tenant, as gateways and publishers compute it with REDIS_STREAM_SHARDS.
-- CRC-16/XMODEM of the decimal text, modulo the number of shards.
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
