//! Values to bytes and back: the only place that knows bincode and zstd.
//!
//! bincode 2.0.1 is finished: its authors ceased development in 2025 and no
//! release will follow, which `RUSTSEC-2025-0141` records. It has no known flaw,
//! and its encoding is small and written down, so it is pinned to that release
//! and confined to this file. Should it have to go, another encoder of the same
//! bytes (little endian; integers above 250 behind a marker byte; lengths before
//! sequences; variants by number) replaces these few calls, and neither wire nor
//! index changes. What comes from outside is decoded under a limit that bincode
//! counts down by the size in memory of what it reads, not by the bytes on the
//! wire, so that small input cannot grow into much memory.
//!
//! In: messages and index records, or bytes of unknown origin. Out: bytes, or
//! values that `check` has looked at. Never: a panic on bytes from a peer.

use bincode::config::{Configuration, Limit, LittleEndian, Varint};
use bincode::error::{DecodeError, EncodeError};
use bytes::{BufMut, BytesMut};
use serde::{Serialize, de::DeserializeOwned};
use zstd::zstd_safe;

use super::frame::{self, FLAG_ZSTD, Frame, Progress};
use super::{LIMITS, Message, WireError, check};

/// What decoding one value may claim in memory, bytes. Numbers claim their full
/// width however short their encoding, so that a full body needs more than its
/// own length.
const CLAIM_BYTES: usize = 48 << 20;
/// Bodies below are not worth compressing.
const COMPRESS_FROM_BYTES: usize = 512;
/// Fast enough for ten gigabits on two cores; higher levels win little on
/// what has mostly been compressed before.
const LEVEL: i32 = 1;
/// Of rows without contents, which are few bytes and alike.
const LEVEL_OF_ROWS: i32 = 6;
/// Of contents on a slow connection, from [`THOROUGH_FROM_BYTES`] on: some 60
/// MB/s on one core (`bench/PROFILE.md`), which is more than such a connection takes.
const LEVEL_THOROUGH: i32 = 9;
/// Smaller bodies are few, or somebody waits for them.
const THOROUGH_FROM_BYTES: usize = 64 << 10;
/// Bodies above are sampled before they are compressed as a whole.
const SAMPLE_FROM_BYTES: usize = 256 << 10;
const SAMPLE_BYTES: usize = 32 << 10;
/// Buffers above are given back rather than kept for the next message.
const KEEP_BYTES: usize = 2 << 20;

type Config = Configuration<LittleEndian, Varint, Limit<CLAIM_BYTES>>;

const fn config() -> Config {
    bincode::config::standard()
        .with_little_endian()
        .with_variable_int_encoding()
        .with_limit::<CLAIM_BYTES>()
}

/// The bytes of a value for this node's own disk.
pub fn to_bytes<T: Serialize>(value: &T) -> Result<Vec<u8>, WireError> {
    bincode::serde::encode_to_vec(value, config()).map_err(unencodable)
}

/// The value of bytes that [`to_bytes`] made, or of damaged ones: never panics.
pub fn from_bytes<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    let (value, used) = bincode::serde::decode_from_slice(bytes, config()).map_err(malformed)?;
    match bytes.len() - used {
        0 => Ok(value),
        bytes => Err(WireError::TrailingBytes { bytes }),
    }
}

/// One message as a whole frame. A connection uses an [`Encoder`] instead.
pub fn encode(message: &Message) -> Result<BytesMut, WireError> {
    let mut out = BytesMut::new();
    Encoder::default().encode(message, Pack::IfSmaller, &mut out)?;
    Ok(out)
}

/// The message of one whole frame. A connection uses a [`Decoder`] instead.
pub fn decode(bytes: &[u8]) -> Result<Message, WireError> {
    let mut buffer = BytesMut::from(bytes);
    match frame::take(&mut buffer)? {
        Progress::Whole(_) if !buffer.is_empty() => Err(WireError::TrailingBytes { bytes: buffer.len() }),
        Progress::Whole(frame) => Decoder::default().decode(&frame),
        Progress::Missing(bytes) => Err(WireError::Malformed {
            why: format!("at least {bytes} bytes of the frame are missing"),
        }),
    }
}

/// Whether a body is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pack {
    Never,
    /// If it is one of content and shrinks by it.
    IfSmaller,
    /// The same, and many bytes by more work: for a connection that takes longer
    /// to carry bytes than this node to make them fewer.
    Thoroughly,
}

/// Turns messages into frames; keeps its buffers and its compressor.
#[derive(Default)]
pub struct Encoder {
    body: Vec<u8>,
    packed: Vec<u8>,
    /// Made when first needed: idle connections do without its megabyte.
    compressor: Option<zstd::bulk::Compressor<'static>>,
}

impl Encoder {
    /// Appends `message` as a frame to `out`, which is left alone on failure.
    pub fn encode(&mut self, message: &Message, pack: Pack, out: &mut BytesMut) -> Result<(), WireError> {
        if pack == Pack::Never || !message.is_bulky() {
            return frame::put_with(0, out, |out| {
                bincode::serde::encode_into_std_write(message, &mut out.writer(), config())
                    .map_err(unencodable)?;
                Ok(())
            });
        }
        self.body.clear();
        bincode::serde::encode_into_std_write(message, &mut self.body, config()).map_err(unencodable)?;
        if self.body.len() > LIMITS.body_bytes {
            let bytes = self.body.len() as u64;
            self.body = Vec::new();
            return Err(WireError::BodyTooLong {
                bytes,
                limit: LIMITS.body_bytes,
            });
        }
        let level = match message.content_bytes() {
            0 => LEVEL_OF_ROWS,
            _ if pack == Pack::Thoroughly && self.body.len() >= THOROUGH_FROM_BYTES => LEVEL_THOROUGH,
            _ => LEVEL,
        };
        let done = if self.pack(level)? {
            frame::put(FLAG_ZSTD, &self.packed, out)
        } else {
            frame::put(0, &self.body, out)
        };
        for buffer in [&mut self.body, &mut self.packed] {
            if buffer.capacity() > KEEP_BYTES {
                *buffer = Vec::new();
            }
        }
        done
    }

    /// Compresses the body, unless it is small or does not shrink. Says whether
    /// `packed` holds it now.
    fn pack(&mut self, level: i32) -> Result<bool, WireError> {
        if self.body.len() < COMPRESS_FROM_BYTES {
            return Ok(false);
        }
        let compressor = match &mut self.compressor {
            Some(compressor) => compressor,
            none => none.insert(zstd::bulk::Compressor::new(level).map_err(compression)?),
        };
        compressor.set_compression_level(level).map_err(compression)?;
        if self.body.len() > SAMPLE_FROM_BYTES {
            // The middle: the beginning often differs from all that follows.
            let start = (self.body.len() - SAMPLE_BYTES) / 2;
            let sample = &self.body[start..start + SAMPLE_BYTES];
            compress(compressor, sample, &mut self.packed)?;
            if !is_smaller(&self.packed, sample) {
                return Ok(false);
            }
        }
        compress(compressor, &self.body, &mut self.packed)?;
        Ok(is_smaller(&self.packed, &self.body))
    }
}

fn compress(
    compressor: &mut zstd::bulk::Compressor<'static>,
    from: &[u8],
    to: &mut Vec<u8>,
) -> Result<(), WireError> {
    to.clear();
    to.reserve(zstd_safe::compress_bound(from.len()));
    compressor.compress_to_buffer(from, to).map_err(compression)?;
    Ok(())
}

/// By enough to be worth the receiver's time.
fn is_smaller(packed: &[u8], body: &[u8]) -> bool {
    packed.len() + packed.len() / 32 < body.len()
}

/// Turns frames into checked messages; keeps its buffer and its decompressor.
#[derive(Default)]
pub struct Decoder {
    unpacked: Vec<u8>,
    decompressor: Option<zstd::bulk::Decompressor<'static>>,
}

impl Decoder {
    pub fn decode(&mut self, frame: &Frame) -> Result<Message, WireError> {
        let mut message: Message = match frame.flags {
            0 => from_bytes(&frame.body)?,
            FLAG_ZSTD => {
                self.unpack(&frame.body)?;
                let message = from_bytes(&self.unpacked);
                if self.unpacked.capacity() > KEEP_BYTES {
                    self.unpacked = Vec::new();
                }
                message?
            }
            flags => return Err(WireError::UnknownFlags { flags }),
        };
        check::check(&mut message)?;
        Ok(message)
    }

    /// Decompresses a body. The size that zstd's header announces is a bound,
    /// itself bounded, and not a promise: zstd stops at the buffer's end.
    fn unpack(&mut self, body: &[u8]) -> Result<(), WireError> {
        let announced = match zstd_safe::get_frame_content_size(body) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => {
                return Err(WireError::Compression {
                    why: "it does not say its size".into(),
                });
            }
            Err(_) => {
                return Err(WireError::Compression {
                    why: "it is not zstd's".into(),
                });
            }
        };
        if announced > LIMITS.body_bytes as u64 {
            return Err(WireError::BodyTooLong {
                bytes: announced,
                limit: LIMITS.body_bytes,
            });
        }
        let decompressor = match &mut self.decompressor {
            Some(decompressor) => decompressor,
            none => none.insert(zstd::bulk::Decompressor::new().map_err(compression)?),
        };
        self.unpacked.clear();
        self.unpacked.reserve_exact(announced as usize);
        let got = decompressor
            .decompress_to_buffer(body, &mut self.unpacked)
            .map_err(compression)?;
        if got as u64 != announced {
            let why = format!("it announces {announced} bytes and has {got}");
            return Err(WireError::Compression { why });
        }
        Ok(())
    }
}

fn compression(why: std::io::Error) -> WireError {
    WireError::Compression { why: why.to_string() }
}

fn unencodable(why: EncodeError) -> WireError {
    WireError::Unencodable { why: why.to_string() }
}

/// bincode's errors print as code; these are for people.
fn malformed(why: DecodeError) -> WireError {
    let why = match why {
        DecodeError::UnexpectedEnd { .. } => "it ends too early".to_owned(),
        DecodeError::LimitExceeded => "it would take more memory than is allowed".to_owned(),
        DecodeError::InvalidIntegerType { .. } => "a number is larger than its place".to_owned(),
        DecodeError::InvalidBooleanValue(byte) => format!("{byte} is neither yes nor no"),
        DecodeError::Utf8 { .. } => "a text is not UTF-8".to_owned(),
        DecodeError::OtherString(text) => unknown_kind(&text).unwrap_or(text),
        other => format!("{other:?}"),
    };
    WireError::Malformed { why }
}

/// serde tells of a variant that there is not only in words for programmers.
/// The variant may be a message's, or that of something in a message.
fn unknown_kind(text: &str) -> Option<String> {
    let number = text.strip_prefix("invalid value: integer `")?;
    let (number, _) = number.split_once("`, expected variant index ")?;
    Some(format!("something in it is of an unknown kind (number {number})"))
}

#[cfg(test)]
#[path = "codec_tests.rs"]
mod tests;
