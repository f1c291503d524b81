// CRC-32C (Castagnoli, RFC 3720 appendix B.4), by the processor's instruction where it has one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace longlive::bank {

// Of `bytes` bytes; `crc` is the checksum of what came before them, 0 at the start.
std::uint32_t crc32c(const void* data, std::size_t bytes, std::uint32_t crc = 0);

// The same by tables alone: what crc32c does on a processor without the instruction.
std::uint32_t crc32c_by_tables(const void* data, std::size_t bytes, std::uint32_t crc = 0);

// Whether crc32c uses the instruction here.
bool crc32c_has_instruction();

}  // namespace longlive::bank
