#include "bank/crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#define LONGLIVE_CRC_TARGET __attribute__((target("sse4.2")))
#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#define LONGLIVE_CRC_TARGET
#endif

namespace longlive::bank {
namespace {

// Polynomials over GF(2) modulo Castagnoli's, bit-reversed: bit 31 is x^0, as the checksum itself.
constexpr std::uint32_t kPolynomial = 0x82f63b78;

using Table = std::array<std::uint32_t, 256>;

constexpr std::uint32_t times_x(std::uint32_t a) { return (a & 1) != 0 ? (a >> 1) ^ kPolynomial : a >> 1; }

// tables[k][b]: byte b followed by k zero bytes.
constexpr std::array<Table, 8> make_tables() {
  std::array<Table, 8> tables{};
  for (std::uint32_t b = 0; b < 256; ++b) {
    std::uint32_t crc = b;
    for (int bit = 0; bit < 8; ++bit) crc = times_x(crc);
    tables[0][b] = crc;
  }
  for (std::size_t k = 1; k < 8; ++k) {
    for (std::size_t b = 0; b < 256; ++b) {
      tables[k][b] = (tables[k - 1][b] >> 8) ^ tables[0][tables[k - 1][b] & 255];
    }
  }
  return tables;
}
constexpr std::array<Table, 8> kTables = make_tables();

// On the inverted checksum, as everything below.
std::uint32_t table_bytes(std::uint32_t crc, const unsigned char* data, std::size_t bytes) {
  for (; bytes > 0; --bytes, ++data) crc = (crc >> 8) ^ kTables[0][(crc ^ *data) & 255];
  return crc;
}

std::uint32_t table_words(std::uint32_t crc, const unsigned char* data, std::size_t bytes) {
  for (; bytes >= 8; bytes -= 8, data += 8) {
    // by bytes, so that it holds in either byte order
    std::uint32_t low = crc;
    for (int k = 0; k < 4; ++k) low ^= static_cast<std::uint32_t>(data[k]) << (8 * k);
    crc = kTables[7][low & 255] ^ kTables[6][(low >> 8) & 255] ^ kTables[5][(low >> 16) & 255] ^ kTables[4][low >> 24] ^
          kTables[3][data[4]] ^ kTables[2][data[5]] ^ kTables[1][data[6]] ^ kTables[0][data[7]];
  }
  return table_bytes(crc, data, bytes);
}

#if defined(LONGLIVE_CRC_TARGET)

constexpr std::uint32_t product(std::uint32_t a, std::uint32_t b) {
  std::uint32_t sum = 0;
  for (std::uint32_t bit = 0x80000000; bit != 0; bit >>= 1) {
    if ((a & bit) != 0) sum ^= b;
    b = times_x(b);
  }
  return sum;
}

// What a checksum becomes when `Bytes` zero bytes follow, by the bytes of the checksum: a product with x^(8 * Bytes).
template <std::size_t Bytes>
struct ZeroBytes {
  static constexpr std::array<Table, 4> make() {
    std::uint32_t factor = 0x80000000, square = 0x40000000;
    for (std::size_t power = 8 * Bytes; power != 0; power >>= 1) {
      if ((power & 1) != 0) factor = product(factor, square);
      square = product(square, square);
    }
    std::array<Table, 4> tables{};
    for (std::size_t k = 0; k < 4; ++k) {
      for (std::uint32_t b = 0; b < 256; ++b) tables[k][b] = product(factor, b << (8 * k));
    }
    return tables;
  }
  static constexpr std::array<Table, 4> tables = make();

  static std::uint32_t append(std::uint32_t crc) {
    return tables[0][crc & 255] ^ tables[1][(crc >> 8) & 255] ^ tables[2][(crc >> 16) & 255] ^ tables[3][crc >> 24];
  }
};

LONGLIVE_CRC_TARGET inline std::uint64_t step(std::uint64_t crc, const unsigned char* data) {
  std::uint64_t word;
  std::memcpy(&word, data, 8);
#if defined(__x86_64__)
  return _mm_crc32_u64(crc, word);
#else
  return __crc32cd(static_cast<std::uint32_t>(crc), word);
#endif
}

// The instruction takes three cycles and one can start in each: three stretches of `Bytes` at a time, then joined.
template <std::size_t Bytes>
LONGLIVE_CRC_TARGET std::uint32_t triples(std::uint32_t crc, const unsigned char*& data, std::size_t& bytes) {
  while (bytes >= 3 * Bytes) {
    std::uint64_t first = crc, second = 0, third = 0;
    for (const unsigned char* const end = data + Bytes; data != end; data += 8) {
      first = step(first, data);
      second = step(second, data + Bytes);
      third = step(third, data + 2 * Bytes);
    }
    crc = ZeroBytes<Bytes>::append(static_cast<std::uint32_t>(first)) ^ static_cast<std::uint32_t>(second);
    crc = ZeroBytes<Bytes>::append(crc) ^ static_cast<std::uint32_t>(third);
    data += 2 * Bytes;
    bytes -= 3 * Bytes;
  }
  return crc;
}

LONGLIVE_CRC_TARGET std::uint32_t instruction_words(std::uint32_t crc, const unsigned char* data, std::size_t bytes) {
  crc = triples<8192>(crc, data, bytes);
  crc = triples<512>(crc, data, bytes);
  std::uint64_t wide = crc;
  for (; bytes >= 8; bytes -= 8, data += 8) wide = step(wide, data);
  return table_bytes(static_cast<std::uint32_t>(wide), data, bytes);
}

#endif

}  // namespace

bool crc32c_has_instruction() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("sse4.2") != 0;
  return has;
#elif defined(LONGLIVE_CRC_TARGET)
  return true;
#else
  return false;
#endif
}

std::uint32_t crc32c_by_tables(const void* data, std::size_t bytes, std::uint32_t crc) {
  return ~table_words(~crc, static_cast<const unsigned char*>(data), bytes);
}

std::uint32_t crc32c(const void* data, std::size_t bytes, std::uint32_t crc) {
#if defined(LONGLIVE_CRC_TARGET)
  if (crc32c_has_instruction()) return ~instruction_words(~crc, static_cast<const unsigned char*>(data), bytes);
#endif
  return crc32c_by_tables(data, bytes, crc);
}

}  // namespace longlive::bank
