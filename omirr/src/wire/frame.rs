//! Frames: where one message ends and the next begins.
//!
//! A frame is a length (u32, little endian) of what follows it, one byte of
//! flags, and the body. There is no checksum: TLS has authenticated every byte
//! before it gets here. A frame that announces more than the limit is refused
//! before anything is allocated for it.

use bytes::{Buf, BytesMut};

use super::{LIMITS, WireError};

/// The length's own bytes.
const LENGTH_BYTES: usize = 4;
/// What stands before the body: length and flags.
pub const HEADER_BYTES: usize = LENGTH_BYTES + 1;
/// The body is compressed with zstd.
pub const FLAG_ZSTD: u8 = 1;

/// A whole frame, not yet looked into.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame {
    pub flags: u8,
    pub body: BytesMut,
}

/// How much of a frame is there.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    Whole(Frame),
    /// So many bytes are still to come, at least.
    Missing(usize),
}

/// Takes the first frame off `buffer`, if all of it is there.
pub fn take(buffer: &mut BytesMut) -> Result<Progress, WireError> {
    let Some(length) = buffer.first_chunk::<LENGTH_BYTES>() else {
        return Ok(Progress::Missing(LENGTH_BYTES - buffer.len()));
    };
    let length = u32::from_le_bytes(*length);
    let whole = u64::from(length) + LENGTH_BYTES as u64;
    if whole > LIMITS.frame_bytes as u64 {
        return Err(WireError::FrameTooLong {
            bytes: whole,
            limit: LIMITS.frame_bytes,
        });
    }
    if length < 2 {
        return Err(WireError::FrameEmpty);
    }
    let whole = whole as usize;
    if buffer.len() < whole {
        return Ok(Progress::Missing(whole - buffer.len()));
    }
    let mut frame = buffer.split_to(whole);
    frame.advance(LENGTH_BYTES);
    let flags = frame.get_u8();
    Ok(Progress::Whole(Frame { flags, body: frame }))
}

/// Appends a frame to `out`.
pub fn put(flags: u8, body: &[u8], out: &mut BytesMut) -> Result<(), WireError> {
    out.reserve(HEADER_BYTES + body.len());
    put_with(flags, out, |out| {
        out.extend_from_slice(body);
        Ok(())
    })
}

/// Appends a frame to `out`, whose body `write` appends. `out` is left alone on
/// failure.
pub fn put_with(
    flags: u8,
    out: &mut BytesMut,
    write: impl FnOnce(&mut BytesMut) -> Result<(), WireError>,
) -> Result<(), WireError> {
    let start = out.len();
    out.extend_from_slice(&[0; LENGTH_BYTES]);
    out.extend_from_slice(&[flags]);
    let done = write(out).and_then(|()| {
        let bytes = out.len() - start;
        if bytes > LIMITS.frame_bytes {
            return Err(WireError::FrameTooLong {
                bytes: bytes as u64,
                limit: LIMITS.frame_bytes,
            });
        }
        let length = (bytes - LENGTH_BYTES) as u32;
        out[start..start + LENGTH_BYTES].copy_from_slice(&length.to_le_bytes());
        Ok(())
    });
    if done.is_err() {
        out.truncate(start);
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_out_as_it_went_in_however_it_is_cut() {
        let mut bytes = BytesMut::new();
        put(0, b"one", &mut bytes).unwrap();
        put(FLAG_ZSTD, b"two", &mut bytes).unwrap();
        let mut buffer = BytesMut::new();
        let mut got = Vec::new();
        for byte in bytes {
            buffer.extend_from_slice(&[byte]);
            if let Progress::Whole(frame) = take(&mut buffer).unwrap() {
                got.push((frame.flags, frame.body.to_vec()));
            }
        }
        assert_eq!(got, [(0, b"one".to_vec()), (FLAG_ZSTD, b"two".to_vec())]);
        assert_eq!(take(&mut buffer), Ok(Progress::Missing(4)));
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_from_the_first_four_bytes() {
        for length in [u32::MAX, LIMITS.frame_bytes as u32 - 3] {
            let mut buffer = BytesMut::from(&length.to_le_bytes()[..]);
            let before = buffer.capacity();
            let bytes = u64::from(length) + 4;
            assert_eq!(
                take(&mut buffer),
                Err(WireError::FrameTooLong {
                    bytes,
                    limit: LIMITS.frame_bytes
                })
            );
            assert_eq!(buffer.capacity(), before);
        }
        let most = LIMITS.frame_bytes as u32 - 4;
        let mut buffer = BytesMut::from(&most.to_le_bytes()[..]);
        assert_eq!(take(&mut buffer), Ok(Progress::Missing(most as usize)));
    }

    #[test]
    fn a_frame_without_a_body_is_refused() {
        for length in [0u32, 1] {
            let mut buffer = BytesMut::from(&length.to_le_bytes()[..]);
            assert_eq!(take(&mut buffer), Err(WireError::FrameEmpty));
        }
    }

    #[test]
    fn a_body_beyond_the_limit_is_not_sent() {
        let body = vec![0; LIMITS.frame_bytes];
        let mut out = BytesMut::new();
        assert!(matches!(
            put(0, &body, &mut out),
            Err(WireError::FrameTooLong { .. })
        ));
        assert!(out.is_empty());
    }
}
