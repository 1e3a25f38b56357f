//! From a record's bytes to an event.
//!
//! In: what lay in the ring, possibly followed by padding. Out: the event with
//! the device number as `stat` shows it, or nothing if the bytes are no record.

use omirr_common::event::{HEADER_BYTES, NAME_MAX, TO_OFFSET, flag, op};

use crate::source::{Dirent, Event, Op, OpSet, Written};

/// A record, read but not yet translated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded {
    /// `dev` is still the kernel's.
    pub event: Event,
    /// The kernel's device number.
    pub kernel_dev: u32,
    /// A barrier's marker.
    pub own: bool,
}

/// Reads one record.
pub fn decode(bytes: &[u8]) -> Option<Decoded> {
    let u64_at = |at: usize| bytes.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes);
    let u32_at = |at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
    let u16_at = |at: usize| bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes);
    let comm: [u8; 16] = bytes.get(80..HEADER_BYTES)?.try_into().ok()?;
    let flags = bytes[73];
    let name = |at: usize, len: u16| -> Option<Box<[u8]>> {
        let len = usize::from(len);
        if len > NAME_MAX {
            None
        } else {
            bytes.get(at..at + len).map(Box::from)
        }
    };
    let at = match flags & flag::AT {
        0 => None,
        _ => Some(Dirent {
            dir: u64_at(32)?,
            name: name(HEADER_BYTES, u16_at(76)?)?,
        }),
    };
    let to = match flags & flag::TO {
        0 => None,
        _ => Some(Dirent {
            dir: u64_at(40)?,
            name: name(TO_OFFSET, u16_at(78)?)?,
        }),
    };
    let range = match flags & flag::RANGE {
        0 => None,
        _ => Some((u64_at(16)?, u64_at(24)?)),
    };
    let kernel_dev = u32_at(64)?;
    let event = Event {
        time_ns: u64_at(0)?,
        op: op_of(bytes[72])?,
        also: OpSet::default(),
        dev: u64::from(kernel_dev),
        ino: u64_at(8)?,
        generation: u32_at(68)?,
        is_dir: flags & flag::DIR != 0,
        mapped: flags & flag::MAPPED != 0,
        stale: false,
        at,
        to,
        range,
        written: Written::Anywhere,
        unmapped: flags & (flag::ASKED | flag::MAPPED) == flag::ASKED,
        pid: u32_at(56)?,
        uid: u32_at(60)?,
        cgroup: u64_at(48)?,
        comm,
    };
    Some(Decoded {
        event,
        kernel_dev,
        own: flags & flag::OWN != 0,
    })
}

/// The operation of a number that both sides know.
pub fn op_of(byte: u8) -> Option<Op> {
    Some(match byte {
        op::WRITE => Op::Write,
        op::TRUNCATE => Op::Truncate,
        op::FALLOCATE => Op::Fallocate,
        op::CREATE => Op::Create,
        op::MKDIR => Op::Mkdir,
        op::MKNOD => Op::Mknod,
        op::SYMLINK => Op::Symlink,
        op::LINK => Op::Link,
        op::UNLINK => Op::Unlink,
        op::RMDIR => Op::Rmdir,
        op::RENAME => Op::Rename,
        op::EXCHANGE => Op::Exchange,
        op::ATTR => Op::Attr,
        op::XATTR => Op::Xattr,
        op::CLOSE => Op::Close,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A rename of `old` to `new`, as the programs write it.
    fn rename() -> Vec<u8> {
        let mut b = vec![0u8; TO_OFFSET + 3];
        b[0..8].copy_from_slice(&7u64.to_ne_bytes());
        b[8..16].copy_from_slice(&42u64.to_ne_bytes());
        b[32..40].copy_from_slice(&2u64.to_ne_bytes());
        b[40..48].copy_from_slice(&3u64.to_ne_bytes());
        b[56..60].copy_from_slice(&100u32.to_ne_bytes());
        b[64..68].copy_from_slice(&(8u32 << 20 | 1).to_ne_bytes());
        b[72] = op::RENAME;
        b[73] = flag::AT | flag::TO;
        b[76..78].copy_from_slice(&3u16.to_ne_bytes());
        b[78..80].copy_from_slice(&3u16.to_ne_bytes());
        b[80..83].copy_from_slice(b"mv\0");
        b[HEADER_BYTES..HEADER_BYTES + 3].copy_from_slice(b"old");
        b[TO_OFFSET..].copy_from_slice(b"new");
        b
    }

    #[test]
    fn a_record_becomes_an_event() {
        let decoded = decode(&rename()).unwrap();
        let event = &decoded.event;
        assert_eq!(
            (event.op, event.ino, event.time_ns, event.pid),
            (Op::Rename, 42, 7, 100)
        );
        assert_eq!(
            event.at,
            Some(Dirent {
                dir: 2,
                name: (*b"old").into()
            })
        );
        assert_eq!(
            event.to,
            Some(Dirent {
                dir: 3,
                name: (*b"new").into()
            })
        );
        assert_eq!((event.range, event.comm().as_str()), (None, "mv"));
        assert_eq!(decoded.kernel_dev, 8 << 20 | 1);
    }

    #[test]
    fn padding_is_passed_over_and_a_short_record_is_refused() {
        let whole = rename();
        let mut padded = whole.clone();
        padded.extend_from_slice(&[9; 4]);
        assert_eq!(decode(&padded), decode(&whole));
        for len in 0..whole.len() {
            assert_eq!(decode(&whole[..len]), None, "{len} bytes");
        }
    }

    #[test]
    fn an_unknown_operation_or_an_impossible_length_is_no_record() {
        let mut bytes = rename();
        bytes[72] = 99;
        assert_eq!(decode(&bytes), None);
        let mut bytes = rename();
        bytes[76..78].copy_from_slice(&300u16.to_ne_bytes());
        bytes.resize(2000, 0);
        assert_eq!(decode(&bytes), None);
    }
}
