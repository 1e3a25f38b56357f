//! Whether a decoded message is one that this node may act upon.
//!
//! What decoding cannot see: ranges, order, names that would reach a shell, a
//! terminal or `chown` with another meaning. A violation names the path and what
//! the peer said about it. Whether a message fits the conversation is the
//! session's business, not this file's.

use super::{LIMITS, Message, Part, WireError, WireRow};
use crate::content::LEAVES_MAX;
use crate::content::patch::{PATCH_BLOCKS_MAX, PATCH_LEAVES_MAX};
use crate::engine::TREE_ROWS_MAX;
use crate::model::{
    CGROUP_BYTES_MAX, COMMAND_BYTES_MAX, Entry, Kind, Origin, RelPath, ReplicaId, Sketch, TreeMove, Version,
    Xattr, is_temp_name,
};

/// Chunk names in one `Want`. `content::ChunkSize` keeps files up to 512 GiB
/// below it.
pub const MAX_HAVE: usize = 262_144;
/// Parts in one `Content`; a group of the sender has far fewer.
const MAX_PARTS: usize = 65_536;
/// Nodes that have ever written to a share.
const MAX_NAMES: usize = 65_536;
/// Pairs in one version vector.
const MAX_PAIRS: usize = 4096;
/// A node's or share's name, bytes.
const MAX_NAME_BYTES: usize = 255;
/// A reason or a software's name, bytes; what is longer is cut, not refused.
const MAX_TEXT_BYTES: usize = 4096;
/// Linux' PATH_MAX less its NUL: a symlink's target is no longer.
const MAX_TARGET_BYTES: usize = 4095;
/// Linux' XATTR_NAME_MAX, XATTR_SIZE_MAX and XATTR_LIST_MAX: every set of
/// attributes that a kernel can list passes.
const MAX_XATTR_NAME_BYTES: usize = 255;
const MAX_XATTR_VALUE_BYTES: usize = 65_536;
const MAX_XATTR_LIST_BYTES: usize = 65_536;
/// About the year 10889: leaves room to count on.
const MAX_WALL_MS: u64 = 1 << 48;
/// Counters and sequence numbers stay clear of overflow.
const MAX_COUNTER: u64 = 1 << 62;
const MAX_STAMP_COUNT: u32 = 1 << 30;
/// The largest offset that Linux knows.
const MAX_FILE_BYTES: u64 = i64::MAX as u64;
/// `chown` takes it as "leave as it is", so no file can belong to it.
const NOBODY: u32 = u32::MAX;

/// Refuses a message that cannot be, and makes its texts fit to be shown.
pub(super) fn check(message: &mut Message) -> Result<(), WireError> {
    let name = message.name();
    let impossible = |what: String| WireError::Impossible { message: name, what };
    match message {
        Message::Hello {
            protocol: _,
            software,
            node,
            share,
            replica: _,
            head,
            names,
        } => {
            tidy(software);
            check_name("the node's name", node).map_err(impossible)?;
            check_name("the share's name", share).map_err(impossible)?;
            check_counter("the highest sequence number", *head).map_err(impossible)?;
            check_names(names).map_err(impossible)
        }
        Message::Welcome {
            protocol: _,
            software,
            node,
            replica: _,
            cursor,
            bare: _,
            names,
            head,
        } => {
            tidy(software);
            check_name("the node's name", node).map_err(impossible)?;
            check_counter("the cursor", *cursor).map_err(impossible)?;
            check_counter("the highest sequence number", *head).map_err(impossible)?;
            check_names(names).map_err(impossible)
        }
        Message::Refuse { reason } | Message::Gone { id: _, reason } => {
            tidy(reason);
            Ok(())
        }
        Message::Batch { upto, rows } => check_batch(name, *upto, rows),
        Message::Want {
            id: _,
            path,
            size,
            hash: _,
            have,
        } => {
            check_path(path).map_err(impossible)?;
            check_file_bytes(*size).map_err(impossible)?;
            at_most("chunk names", have.len(), MAX_HAVE).map_err(impossible)
        }
        Message::Content {
            id: _,
            parts,
            last: _,
        } => {
            at_most("parts", parts.len(), MAX_PARTS).map_err(impossible)?;
            check_parts(parts).map_err(impossible)
        }
        Message::Ack {
            durable,
            pending: _,
            reason,
            head,
        } => {
            if let Some(reason) = reason {
                tidy(reason);
            }
            check_counter("the highest sequence number", *head).map_err(impossible)?;
            check_counter("the acknowledged sequence number", *durable).map_err(impossible)
        }
        Message::Ping => Ok(()),
        Message::Pong { clock_ms } => {
            if *clock_ms > MAX_WALL_MS {
                return Err(impossible(format!("its clock says {clock_ms} ms since 1970")));
            }
            Ok(())
        }
        Message::Plain { after, upto } => {
            check_counter("the number up to which rows are wanted", *upto).map_err(impossible)?;
            if after >= upto {
                return Err(impossible(format!(
                    "rows are wanted after {after} and up to {upto}"
                )));
            }
            Ok(())
        }
        Message::Again { after } => {
            check_counter("the number after which it begins", *after).map_err(impossible)
        }
        Message::Compare {
            id: _,
            path,
            size,
            hash: _,
            base: _,
            base_size,
            leaves,
        } => {
            check_path(path).map_err(impossible)?;
            check_file_bytes(*size).map_err(impossible)?;
            check_file_bytes(*base_size).map_err(impossible)?;
            at_most("names of leaves", leaves.len(), LEAVES_MAX).map_err(impossible)
        }
        Message::Differs { id: _, leaves: None } => Ok(()),
        Message::Differs {
            id: _,
            leaves: Some(leaves),
        } => {
            at_most("leaves that differ", leaves.len(), PATCH_LEAVES_MAX).map_err(impossible)?;
            match leaves.is_sorted_by(|one, next| one < next) {
                true => Ok(()),
                false => Err(impossible("the leaves that differ are not in order".into())),
            }
        }
        Message::Blocks { id: _, blocks } => {
            at_most("names of blocks", blocks.len(), PATCH_BLOCKS_MAX).map_err(impossible)
        }
    }
}

fn check_batch(message: &'static str, upto: u64, rows: &[WireRow]) -> Result<(), WireError> {
    let impossible = |what: String| WireError::Impossible { message, what };
    at_most("rows", rows.len(), LIMITS.batch_rows).map_err(impossible)?;
    check_counter("its end", upto).map_err(impossible)?;
    for row in rows {
        let wrong = |what: String| WireError::ImpossibleRow {
            message,
            path: row.path.clone(),
            what,
        };
        if row.seq == 0 {
            return Err(wrong("its sequence number is 0".into()));
        }
        check_counter("its sequence number", row.seq).map_err(wrong)?;
        check_row(row).map_err(wrong)?;
    }
    Ok(())
}

fn check_row(row: &WireRow) -> Result<(), String> {
    let entry = &row.row.entry;
    if row.path.is_root() {
        if row.row.deleted {
            return Err("the share's root cannot be deleted".into());
        }
        if !entry.is_dir() {
            return Err(format!("the share's root cannot be a {}", entry.kind_name()));
        }
    } else {
        check_path(&row.path)?;
    }
    check_entry(entry)?;
    check_version(&row.row.version)?;
    if let Some(origin) = &row.row.origin {
        check_origin(origin)?;
    }
    if let Some(from) = &row.moved_from {
        check_path(from).map_err(|what| format!("moved from {from}: {what}"))?;
    }
    if let Some(tree) = &row.moved_tree {
        check_tree(row, tree).map_err(|what| format!("moved to {}: {what}", tree.to))?;
    }
    check_sketch(&row.sketch)?;
    match (&row.inline, row.row.live().and_then(Entry::content)) {
        (None, _) => Ok(()),
        (Some(content), Some((size, _))) if content.len() as u64 == size => Ok(()),
        (Some(content), Some((size, _))) => Err(format!(
            "it is said to have {size} bytes, but {} came with it",
            content.len()
        )),
        (Some(_), None) if row.row.deleted => Err("content came with a deleted file".into()),
        (Some(_), None) => Err(format!("content came with a {}", entry.kind_name())),
    }
}

fn check_sketch(sketch: &Sketch) -> Result<(), String> {
    let values = sketch.values();
    if values.len() > Sketch::VALUES_MAX {
        return Err(format!(
            "a sketch of {} values, {} are allowed",
            values.len(),
            Sketch::VALUES_MAX
        ));
    }
    match values.is_sorted_by(|one, next| one < next) {
        true => Ok(()),
        false => Err("a sketch whose values are not in order".into()),
    }
}

/// A move says what follows from its last row; that must be possible.
fn check_tree(row: &WireRow, tree: &TreeMove) -> Result<(), String> {
    check_path(&row.path)?;
    check_path(&tree.to)?;
    if !row.row.deleted || !row.row.entry.is_dir() {
        return Err("only the tombstone of a directory tells of a move".into());
    }
    if row.path.is_within(&tree.to) || tree.to.is_within(&row.path) {
        return Err("a directory cannot be moved into itself or what it is in".into());
    }
    if tree.count == 0 {
        return Err("nothing moved".into());
    }
    at_most("rows that moved", tree.count as usize, TREE_ROWS_MAX as usize)?;
    let version = &row.row.version;
    let number = version.vector.get(version.stamp.replica);
    if row.seq <= tree.span() || number <= tree.span() {
        return Err(format!(
            "its {} rows cannot end at number {}, which its author calls {number}",
            tree.span() + 1,
            row.seq
        ));
    }
    Ok(())
}

fn check_path(path: &RelPath) -> Result<(), String> {
    if path.is_root() {
        return Err("the share's root is no such path".into());
    }
    if path.names().any(is_temp_name) {
        return Err(format!("{path} names a file that is being staged"));
    }
    Ok(())
}

fn check_entry(entry: &Entry) -> Result<(), String> {
    match &entry.kind {
        Kind::File { size, hash: _ } => check_file_bytes(*size)?,
        Kind::Symlink { target } => {
            if target.is_empty() {
                return Err("the symlink's target is empty".into());
            }
            if target.len() > MAX_TARGET_BYTES {
                return Err(format!(
                    "the symlink's target has {} bytes, the limit is {MAX_TARGET_BYTES}",
                    target.len()
                ));
            }
            if target.contains(&0) {
                return Err("the symlink's target has a NUL byte in it".into());
            }
        }
        Kind::Directory
        | Kind::Fifo
        | Kind::Socket
        | Kind::CharDevice { rdev: _ }
        | Kind::BlockDevice { rdev: _ } => {}
    }
    if entry.mode & !0o7777 != 0 {
        return Err(format!("its mode {:#o} has bits beyond 0o7777", entry.mode));
    }
    if entry.uid == NOBODY || entry.gid == NOBODY {
        return Err(format!("no file can belong to {}:{}", entry.uid, entry.gid));
    }
    if entry.mtime.nanos >= 1_000_000_000 {
        return Err(format!(
            "its time has {} nanoseconds in a second",
            entry.mtime.nanos
        ));
    }
    for (what, name) in [("owner", &entry.user), ("group", &entry.group)] {
        if let Some(name) = name {
            check_name(&format!("the {what}'s name"), name)?;
        }
    }
    if !entry.flags.is_kept() {
        return Err(format!(
            "its flags {:#x} have bits that omirr does not know",
            entry.flags.bits()
        ));
    }
    if !entry.flags.is_empty() && !matches!(entry.kind, Kind::File { .. } | Kind::Directory) {
        return Err(format!("a {} has no flags", entry.kind_name()));
    }
    check_xattrs(&entry.xattrs)
}

fn check_xattrs(xattrs: &[Xattr]) -> Result<(), String> {
    let mut list_bytes = 0;
    let mut before: &[u8] = b"";
    for xattr in xattrs {
        let shown = String::from_utf8_lossy(&xattr.name);
        if xattr.name.is_empty() {
            return Err("an extended attribute has no name".into());
        }
        if xattr.name.len() > MAX_XATTR_NAME_BYTES {
            return Err(format!(
                "the name of an extended attribute has {} bytes, the limit is {MAX_XATTR_NAME_BYTES}",
                xattr.name.len()
            ));
        }
        if xattr.name.contains(&0) {
            return Err(format!(
                "the name of extended attribute {shown:?} has a NUL byte in it"
            ));
        }
        if *xattr.name <= *before {
            return Err(format!(
                "extended attribute {shown:?} is out of order or twice there"
            ));
        }
        if xattr.value.len() > MAX_XATTR_VALUE_BYTES {
            return Err(format!(
                "extended attribute {shown:?} has {} bytes, the limit is {MAX_XATTR_VALUE_BYTES}",
                xattr.value.len()
            ));
        }
        before = &xattr.name;
        list_bytes += xattr.name.len() + 1;
    }
    if list_bytes > MAX_XATTR_LIST_BYTES {
        return Err(format!(
            "the names of its extended attributes have {list_bytes} bytes, the limit is {MAX_XATTR_LIST_BYTES}"
        ));
    }
    Ok(())
}

fn check_version(version: &Version) -> Result<(), String> {
    let pairs = version.vector.pairs();
    at_most("pairs in its version", pairs.len(), MAX_PAIRS)?;
    if !version.vector.is_well_formed() {
        return Err("its version has replicas out of order, twice or with a zero counter".into());
    }
    for pair in pairs {
        check_counter("a counter of its version", pair.1)?;
    }
    let stamp = version.stamp;
    if stamp.wall_ms >= MAX_WALL_MS {
        return Err(format!(
            "its stamp of {} ms since 1970 is too far ahead",
            stamp.wall_ms
        ));
    }
    if stamp.count >= MAX_STAMP_COUNT {
        return Err(format!(
            "its stamp counts {} changes in one millisecond",
            stamp.count
        ));
    }
    Ok(())
}

/// What a node tells of a process ends up on terminals of other nodes.
fn check_origin(origin: &Origin) -> Result<(), String> {
    for (what, text, limit) in [
        ("command", &origin.command, COMMAND_BYTES_MAX),
        ("cgroup", &origin.cgroup, CGROUP_BYTES_MAX),
    ] {
        if text.len() > limit {
            return Err(format!(
                "the {what} that is said to have changed it has {} bytes, the limit is {limit}",
                text.len()
            ));
        }
        if text.chars().any(char::is_control) {
            return Err(format!(
                "the {what} {text:?} that is said to have changed it has a control character in it"
            ));
        }
    }
    Ok(())
}

fn check_parts(parts: &[Part]) -> Result<(), String> {
    for part in parts {
        match part {
            Part::Data(data) if data.is_empty() => return Err("a piece of content is empty".into()),
            Part::Hole(0) => return Err("a hole is empty".into()),
            Part::Hole(bytes) => check_file_bytes(*bytes)?,
            Part::Data(_) | Part::Have(_) => {}
        }
    }
    Ok(())
}

fn check_names(names: &[(ReplicaId, String)]) -> Result<(), String> {
    at_most("names of nodes", names.len(), MAX_NAMES)?;
    names
        .iter()
        .try_for_each(|(_, name)| check_name("a node's name", name))
}

/// Names of nodes become part of file names, names of shares part of messages.
fn check_name(what: &str, name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err(format!("{what} is empty"));
    }
    if name.len() > MAX_NAME_BYTES {
        return Err(format!(
            "{what} has {} bytes, the limit is {MAX_NAME_BYTES}",
            name.len()
        ));
    }
    if name.contains('/') || name.chars().any(char::is_control) {
        return Err(format!("{what} {name:?} has '/' or a control character in it"));
    }
    Ok(())
}

fn check_counter(what: &str, counter: u64) -> Result<(), String> {
    if counter < MAX_COUNTER {
        Ok(())
    } else {
        Err(format!("{what} {counter} is beyond all counting"))
    }
}

fn check_file_bytes(bytes: u64) -> Result<(), String> {
    if bytes <= MAX_FILE_BYTES {
        Ok(())
    } else {
        Err(format!("no file can have {bytes} bytes"))
    }
}

fn at_most(what: &str, count: usize, limit: usize) -> Result<(), String> {
    if count <= limit {
        Ok(())
    } else {
        Err(format!("{count} {what}, the limit is {limit}"))
    }
}

/// Texts from a peer end up in logs and on terminals.
fn tidy(text: &mut String) {
    if text.len() > MAX_TEXT_BYTES {
        text.truncate(text.floor_char_boundary(MAX_TEXT_BYTES));
    }
    if text.chars().any(char::is_control) {
        *text = text
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect();
    }
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
