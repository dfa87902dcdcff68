//! How codes and the small scales of sub-blocks lie in bytes.

/// Codes of `bits` bits from bytes: of every `group` bytes the lowest bits are `group` codes, then the next higher bits, and
/// so on. They are shifted left by `shift` and added to what is in `codes`.
#[inline]
pub(super) fn unpack(bytes: &[u8], bits: u32, group: usize, shift: u32, codes: &mut [u8]) {
    let (planes, mask) = (8 / bits as usize, (1 << bits) - 1);
    for (bytes, codes) in bytes.chunks_exact(group).zip(codes.chunks_exact_mut(group * planes)) {
        for (plane, codes) in codes.chunks_exact_mut(group).enumerate() {
            for (code, byte) in codes.iter_mut().zip(bytes) {
                *code |= (byte >> (plane as u32 * bits) & mask) << shift;
            }
        }
    }
}

/// The reverse of [`unpack`]: adds the bits `shift..shift + bits` of each code to `bytes`.
#[inline]
pub(super) fn pack(codes: &[u8], bits: u32, group: usize, shift: u32, bytes: &mut [u8]) {
    let (planes, mask) = (8 / bits as usize, (1 << bits) - 1);
    for (bytes, codes) in bytes.chunks_exact_mut(group).zip(codes.chunks_exact(group * planes)) {
        for (plane, codes) in codes.chunks_exact(group).enumerate() {
            for (byte, code) in bytes.iter_mut().zip(codes) {
                *byte |= (code >> shift & mask) << (plane as u32 * bits);
            }
        }
    }
}

/// The fifth bits of 32 codes: bit i of four little-endian bytes is code i's. Added to `codes`.
#[inline]
pub(super) fn unpack_fifth(bytes: [u8; 4], codes: &mut [u8; 32]) {
    let bits = u32::from_le_bytes(bytes);
    for (i, code) in codes.iter_mut().enumerate() {
        *code |= ((bits >> i & 1) as u8) << 4;
    }
}

/// The reverse of [`unpack_fifth`].
#[inline]
pub(super) fn pack_fifth(codes: &[u8; 32]) -> [u8; 4] {
    let bit = |(i, code): (usize, &u8)| u32::from(code >> 4 & 1) << i;
    codes.iter().enumerate().map(bit).fold(0, |bits, bit| bits | bit).to_le_bytes()
}

/// Eight scales and eight minima of 6 bits in twelve bytes (Q4_K, Q5_K): the first four of each lie in the low bits of
/// bytes 0-3 and 4-7; the others have their low halves in bytes 8-11 and their upper two bits above the first four.
#[inline]
pub(super) fn unpack_pairs(bytes: &[u8; 12]) -> [[u8; 8]; 2] {
    let mut pairs = [[0; 8]; 2];
    for j in 0..4 {
        let (scale, min, low) = (bytes[j], bytes[j + 4], bytes[j + 8]);
        pairs[0][j] = scale & 63;
        pairs[1][j] = min & 63;
        pairs[0][j + 4] = low & 15 | scale >> 6 << 4;
        pairs[1][j + 4] = low >> 4 | min >> 6 << 4;
    }
    pairs
}

/// The reverse of [`unpack_pairs`].
#[inline]
pub(super) fn pack_pairs([scales, mins]: &[[u8; 8]; 2]) -> [u8; 12] {
    let mut bytes = [0; 12];
    for j in 0..4 {
        bytes[j] = scales[j] & 63 | scales[j + 4] >> 4 << 6;
        bytes[j + 4] = mins[j] & 63 | mins[j + 4] >> 4 << 6;
        bytes[j + 8] = scales[j + 4] & 15 | (mins[j + 4] & 15) << 4;
    }
    bytes
}

/// Sixteen scales of 6 bits in twelve bytes (Q3_K), 0 to 63: low halves in bytes 0-7 as codes of 4 bits, upper two bits in
/// bytes 8-11 as codes of 2 bits.
#[inline]
pub(super) fn unpack_sixteen(bytes: &[u8; 12]) -> [u8; 16] {
    let mut scales = [0; 16];
    unpack(&bytes[..8], 4, 8, 0, &mut scales);
    unpack(&bytes[8..], 2, 4, 4, &mut scales);
    scales
}

/// The reverse of [`unpack_sixteen`].
#[inline]
pub(super) fn pack_sixteen(scales: &[u8; 16]) -> [u8; 12] {
    let mut bytes = [0; 12];
    pack(scales, 4, 8, 0, &mut bytes[..8]);
    pack(scales, 2, 4, 4, &mut bytes[8..]);
    bytes
}

/// Eight scales of 6 bits (IQ4_XS), 0 to 63: upper two bits in a little-endian word, low halves two to a byte.
#[inline]
pub(super) fn unpack_eight(high: [u8; 2], low: [u8; 4]) -> [u8; 8] {
    let high = u16::from_le_bytes(high);
    std::array::from_fn(|j| low[j / 2] >> (4 * (j % 2)) & 15 | ((high >> (2 * j) & 3) as u8) << 4)
}

/// The reverse of [`unpack_eight`].
#[inline]
pub(super) fn pack_eight(scales: [u8; 8]) -> ([u8; 2], [u8; 4]) {
    let high = (0..8).fold(0, |bits, j| bits | u16::from(scales[j] >> 4 & 3) << (2 * j));
    let low = std::array::from_fn(|i| scales[2 * i] & 15 | (scales[2 * i + 1] & 15) << 4);
    (high.to_le_bytes(), low)
}
