//! Why bytes are not a message, or a message cannot become bytes.

use crate::model::RelPath;

/// What is wrong with a frame or with the message in it. The text continues a
/// sentence that begins with who sent it: "web2 (10.0.0.2:808) sent …".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    #[error("a frame of {bytes} bytes, the limit is {limit}")]
    FrameTooLong { bytes: u64, limit: usize },
    #[error("a frame without a body")]
    FrameEmpty,
    #[error("a frame with unknown flags {flags:#010b}")]
    UnknownFlags { flags: u8 },
    #[error("a frame whose compressed body is damaged: {why}")]
    Compression { why: String },
    #[error("a message of {bytes} bytes, the limit is {limit}")]
    BodyTooLong { bytes: u64, limit: usize },
    #[error("a frame that holds no message: {why}")]
    Malformed { why: String },
    #[error("a message followed by {bytes} bytes that do not belong to it")]
    TrailingBytes { bytes: usize },
    /// The message is well-formed, but what it says cannot be.
    #[error("a {message} that cannot be: {what}")]
    Impossible { message: &'static str, what: String },
    /// The same, about one path.
    #[error("a {message} with an impossible row for {path}: {what}")]
    ImpossibleRow {
        message: &'static str,
        path: RelPath,
        what: String,
    },
    #[error("a value that cannot be encoded: {why}")]
    Unencodable { why: String },
}
