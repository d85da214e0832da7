-- SHA-256 (FIPS 180-4) in plain Lua 5.4, which has none of its own: sha256(bytes) returns the hex digest.

local K = { -- the first 32 bits of the fractions of the cube roots of the first 64 primes
  0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
  0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
  0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
  0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
  0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
  0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
  0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
  0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
}

local function rotate(word, by)
  return (word >> by | word << 32 - by) & 0xffffffff
end

return function(bytes)
  local padded = bytes .. "\x80" .. ("\0"):rep((55 - #bytes) % 64) .. string.pack(">I8", #bytes * 8)
  local state = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 } -- of the square roots of the first 8
  local words = {}
  for block = 1, #padded, 64 do
    for i = 1, 16 do
      words[i] = string.unpack(">I4", padded, block + 4 * (i - 1))
    end
    for i = 17, 64 do
      local old, new = words[i - 15], words[i - 2]
      local low = rotate(old, 7) ~ rotate(old, 18) ~ old >> 3
      local high = rotate(new, 17) ~ rotate(new, 19) ~ new >> 10
      words[i] = words[i - 16] + low + words[i - 7] + high & 0xffffffff
    end
    local a, b, c, d, e, f, g, h = table.unpack(state)
    for i = 1, 64 do
      local high = rotate(e, 6) ~ rotate(e, 11) ~ rotate(e, 25)
      local first = h + high + (e & f ~ ~e & g) + K[i] + words[i]
      local low = rotate(a, 2) ~ rotate(a, 13) ~ rotate(a, 22)
      local second = low + (a & b ~ a & c ~ b & c)
      a, b, c, d, e, f, g, h = first + second & 0xffffffff, a, b, c, d + first & 0xffffffff, e, f, g
    end
    for i, word in ipairs { a, b, c, d, e, f, g, h } do
      state[i] = state[i] + word & 0xffffffff
    end
  end
  return (("%08x"):rep(8):format(table.unpack(state)))
end
