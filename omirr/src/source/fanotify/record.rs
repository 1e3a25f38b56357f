//! From the bytes that a fanotify descriptor gives to typed records; pure.
//!
//! Layout of one event: `struct fanotify_event_metadata`, then information
//! records, each a 4-byte header (type, padding, length), a filesystem id, a
//! file handle and, for entries of directories, a NUL-terminated name.

use super::handle::HandleRef;

/// `FAN_EVENT_METADATA_LEN`, and the version of the layout that is read here.
const METADATA_LEN: usize = size_of::<libc::fanotify_event_metadata>();
/// Header and filesystem id of an information record.
const INFO_PREFIX: usize = 12;
/// Length and type in front of a handle's bytes.
const HANDLE_PREFIX: usize = 8;

/// `f_fsid` as fanotify reports it.
pub(crate) type FsId = [u8; 8];

/// A name in a directory that is named by its handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry<'a> {
    pub(crate) dir: HandleRef<'a>,
    /// `.` for the directory itself; empty where the kernel gives no name.
    pub(crate) name: &'a [u8],
}

/// One event of the kernel's, borrowed from the buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Record<'a> {
    /// `FAN_*` bits; several, where the kernel merged events.
    pub(crate) mask: u64,
    pub(crate) pid: i32,
    pub(crate) fsid: Option<FsId>,
    /// Where it happened; the old name of a rename.
    pub(crate) at: Option<Entry<'a>>,
    /// The new name of a rename.
    pub(crate) to: Option<Entry<'a>>,
    /// The inode that it happened to.
    pub(crate) target: Option<HandleRef<'a>>,
}

impl Record<'_> {
    pub(crate) fn has(&self, bits: u64) -> bool {
        self.mask & bits != 0
    }
}

/// What the kernel wrote is not what this program understands.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RecordError {
    #[error("a fanotify event of {0} bytes ends before it should")]
    Short(usize),
    #[error("fanotify speaks version {0} of its format, only version {expected} is known", expected = libc::FANOTIFY_METADATA_VERSION)]
    Version(u8),
}

/// Splits the first event off `buffer`; none at its end.
pub(crate) fn next<'a>(buffer: &mut &'a [u8]) -> Result<Option<Record<'a>>, RecordError> {
    if buffer.is_empty() {
        return Ok(None);
    }
    let short = || RecordError::Short(buffer.len());
    let metadata = buffer.get(..METADATA_LEN).ok_or_else(short)?;
    let event_len = u32_at(metadata, 0).ok_or_else(short)? as usize;
    if metadata[4] != libc::FANOTIFY_METADATA_VERSION {
        return Err(RecordError::Version(metadata[4]));
    }
    let metadata_len = usize::from(u16_at(metadata, 6).ok_or_else(short)?);
    let mut record = Record {
        mask: u64_at(metadata, 8).ok_or_else(short)?,
        pid: u32_at(metadata, 20).ok_or_else(short)? as i32,
        ..Record::default()
    };
    // A length below the metadata's own would make this loop stand still.
    if event_len < METADATA_LEN || metadata_len < METADATA_LEN {
        return Err(short());
    }
    let mut infos = buffer.get(metadata_len..event_len).ok_or_else(short)?;
    while !infos.is_empty() {
        let info_len = usize::from(u16_at(infos, 2).ok_or_else(short)?);
        if info_len < 4 {
            return Err(short());
        }
        take_info(&mut record, infos.get(..info_len).ok_or_else(short)?).ok_or_else(short)?;
        infos = &infos[info_len..];
    }
    *buffer = &buffer[event_len..];
    Ok(Some(record))
}

/// Adds what one information record says; none if it is cut off.
fn take_info<'a>(record: &mut Record<'a>, info: &'a [u8]) -> Option<()> {
    let kind = *info.first()?;
    let known = [
        libc::FAN_EVENT_INFO_TYPE_FID,
        libc::FAN_EVENT_INFO_TYPE_DFID,
        libc::FAN_EVENT_INFO_TYPE_DFID_NAME,
        libc::FAN_EVENT_INFO_TYPE_OLD_DFID_NAME,
        libc::FAN_EVENT_INFO_TYPE_NEW_DFID_NAME,
    ];
    if !known.contains(&kind) {
        return Some(());
    }
    let fsid: FsId = info.get(4..INFO_PREFIX)?.try_into().ok()?;
    record.fsid = Some(fsid);
    let handle = info.get(INFO_PREFIX..)?;
    let handle_len = u32_at(handle, 0)? as usize;
    let dir = HandleRef {
        kind: u32_at(handle, 4)? as i32,
        bytes: handle.get(HANDLE_PREFIX..HANDLE_PREFIX + handle_len)?,
    };
    let rest = handle.get(HANDLE_PREFIX + handle_len..)?;
    let name = rest.split(|&byte| byte == 0).next().unwrap_or_default();
    match kind {
        libc::FAN_EVENT_INFO_TYPE_FID => record.target = Some(dir),
        libc::FAN_EVENT_INFO_TYPE_NEW_DFID_NAME => record.to = Some(Entry { dir, name }),
        libc::FAN_EVENT_INFO_TYPE_DFID => record.at = Some(Entry { dir, name: b"" }),
        _ => record.at = Some(Entry { dir, name }),
    }
    Some(())
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// One information record as the kernel lays it out.
    pub(crate) fn info(kind: u8, handle: HandleRef<'_>, name: Option<&[u8]>) -> Vec<u8> {
        let mut bytes = vec![kind, 0, 0, 0];
        bytes.extend_from_slice(b"fsidfsid");
        bytes.extend_from_slice(&(handle.bytes.len() as u32).to_ne_bytes());
        bytes.extend_from_slice(&handle.kind.to_ne_bytes());
        bytes.extend_from_slice(handle.bytes);
        if let Some(name) = name {
            bytes.extend_from_slice(name);
            bytes.push(0);
        }
        while bytes.len() % 4 != 0 {
            bytes.push(0);
        }
        let len = (bytes.len() as u16).to_ne_bytes();
        bytes[2..4].copy_from_slice(&len);
        bytes
    }

    pub(crate) fn event(mask: u64, pid: i32, infos: &[Vec<u8>]) -> Vec<u8> {
        let len = METADATA_LEN + infos.iter().map(Vec::len).sum::<usize>();
        let mut bytes = (len as u32).to_ne_bytes().to_vec();
        bytes.extend_from_slice(&[libc::FANOTIFY_METADATA_VERSION, 0]);
        bytes.extend_from_slice(&(METADATA_LEN as u16).to_ne_bytes());
        bytes.extend_from_slice(&mask.to_ne_bytes());
        bytes.extend_from_slice(&(-1i32).to_ne_bytes());
        bytes.extend_from_slice(&pid.to_ne_bytes());
        for info in infos {
            bytes.extend_from_slice(info);
        }
        bytes
    }

    const DIR: HandleRef<'static> = HandleRef {
        kind: 1,
        bytes: &[1, 0, 0, 0, 9, 9, 9, 9],
    };
    const FILE: HandleRef<'static> = HandleRef {
        kind: 1,
        bytes: &[2, 0, 0, 0, 9, 9, 9, 9],
    };

    #[test]
    fn reads_a_rename_and_an_overflow_out_of_one_buffer() {
        let mut bytes = event(
            libc::FAN_RENAME,
            42,
            &[
                info(libc::FAN_EVENT_INFO_TYPE_OLD_DFID_NAME, DIR, Some(b"old")),
                info(libc::FAN_EVENT_INFO_TYPE_NEW_DFID_NAME, DIR, Some(b"newer")),
                info(libc::FAN_EVENT_INFO_TYPE_FID, FILE, None),
            ],
        );
        bytes.extend(event(libc::FAN_Q_OVERFLOW, 0, &[]));
        let mut rest = &bytes[..];
        let rename = next(&mut rest).expect("well-formed").expect("one");
        assert_eq!(
            (rename.mask, rename.pid, rename.fsid),
            (libc::FAN_RENAME, 42, Some(*b"fsidfsid"))
        );
        assert_eq!(
            rename.at,
            Some(Entry {
                dir: DIR,
                name: b"old"
            })
        );
        assert_eq!(
            rename.to,
            Some(Entry {
                dir: DIR,
                name: b"newer"
            })
        );
        assert_eq!(rename.target, Some(FILE));
        assert!(
            next(&mut rest)
                .expect("well-formed")
                .expect("two")
                .has(libc::FAN_Q_OVERFLOW)
        );
        assert_eq!(next(&mut rest), Ok(None));
    }

    #[test]
    fn every_cut_is_an_error_and_none_reads_past_the_end() {
        let whole = event(
            libc::FAN_CREATE,
            1,
            &[
                info(libc::FAN_EVENT_INFO_TYPE_DFID_NAME, DIR, Some(b"name")),
                info(1, FILE, None),
            ],
        );
        for len in 1..whole.len() {
            assert!(
                next(&mut &whole[..len]).is_err(),
                "{len} of {} bytes",
                whole.len()
            );
        }
        let mut standing_still = whole.clone();
        standing_still[..4].copy_from_slice(&0u32.to_ne_bytes());
        assert!(next(&mut &standing_still[..]).is_err());
        let mut newer = whole;
        newer[4] = 77;
        assert_eq!(next(&mut &newer[..]), Err(RecordError::Version(77)));
    }
}
