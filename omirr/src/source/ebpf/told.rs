//! What an event says of bytes.
//!
//! In: an event, and the entry of the map that was taken with it, from a source that
//! tells of each change of a content. Out: where the content may have changed, and
//! whether nobody had it mapped to write. In doubt it has changed anywhere. Pure.

use omirr_common::dirty::Dirty;

use crate::source::{Event, Op, Written};

/// What changes no content: attributes, and that a writer lets go of the file.
const ATTRIBUTES: [Op; 3] = [Op::Attr, Op::Xattr, Op::Close];
/// What comes with its bytes, or needs none. A name that came or went, and a
/// truncation, may mean that nothing is as it was.
const WITH_BYTES: [Op; 5] = [Op::Write, Op::Fallocate, Op::Attr, Op::Xattr, Op::Close];

/// The ranges of bytes that an entry knows to have changed; none if there are
/// others.
pub(super) fn extents(dirty: &Dirty) -> Option<impl Iterator<Item = (u64, u64)> + '_> {
    let used = dirty.extents.iter().filter(|[_, to]| *to != 0);
    (dirty.range_unknown == 0 && dirty.writers == 0).then_some(used.map(|[from, to]| (*from, *to)))
}

/// Where a content was written to, by an event and the entry that was taken with it,
/// which need not know what the event was sent for; and whether it was seen to be
/// mapped by nobody.
pub(super) fn written(event: &Event, entry: Option<&Dirty>) -> (Written, bool) {
    let mut ops = event.also;
    ops.insert(event.op);
    let asked = event.unmapped || entry.is_some_and(|entry| entry.asked != 0);
    let unmapped = asked && !event.mapped;
    if event.mapped || !ops.is_of(&WITH_BYTES) {
        return (Written::Anywhere, unmapped);
    }
    if ops.is_of(&ATTRIBUTES) {
        return (Written::Nowhere, unmapped);
    }
    let within = |(from, to)| Written::within(from, to);
    let by_itself = match ATTRIBUTES.contains(&event.op) {
        true => Written::Nowhere,
        false => event.range.map_or(Written::Anywhere, within),
    };
    let all = match entry.map(extents) {
        None => by_itself,
        Some(None) => Written::Anywhere,
        Some(Some(extents)) => extents.map(within).fold(by_itself, Written::and),
    };
    (all, unmapped)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn event(op: Op, range: Option<(u64, u64)>) -> Event {
        Event {
            range,
            unmapped: true,
            ..Event::told_by(op, 1, 0, b"test")
        }
    }

    fn entry(extents: &[[u64; 2]]) -> Dirty {
        let mut dirty = Dirty::default();
        dirty.extents[..extents.len()].copy_from_slice(extents);
        dirty
    }

    #[test]
    fn what_the_event_and_the_entry_say_is_joined() {
        let told = event(Op::Write, Some((0, 5)));
        assert_eq!(written(&told, None), (Written::within(0, 5), true));
        let more = entry(&[[3 * MIB, 3 * MIB + 1], [9 * MIB, 10 * MIB]]);
        let all =
            [(0, 5), (3 * MIB, 3 * MIB + 1), (9 * MIB, 10 * MIB)].map(|(from, to)| Written::within(from, to));
        let all = all.into_iter().fold(Written::Nowhere, Written::and);
        assert_eq!(written(&told, Some(&more)), (all, true));
        // The event was sent for a close, and the writes came to the entry after it.
        let mut close = event(Op::Close, None);
        close.also.insert(Op::Write);
        assert_eq!(
            written(&close, Some(&entry(&[[7, 8]]))),
            (Written::within(7, 8), true)
        );
    }

    #[test]
    fn attributes_and_a_close_change_no_content() {
        let mut close = event(Op::Close, None);
        close.also.insert(Op::Xattr);
        assert_eq!(written(&close, None), (Written::Nowhere, true));
        close.unmapped = false;
        assert_eq!(written(&close, Some(&entry(&[]))), (Written::Nowhere, false));
        let asked = Dirty {
            asked: 1,
            ..entry(&[])
        };
        assert_eq!(written(&close, Some(&asked)), (Written::Nowhere, true));
    }

    #[test]
    fn in_doubt_it_is_everywhere() {
        let anywhere = |event: &Event, entry: Option<&Dirty>, why: &str| {
            assert_eq!(written(event, entry).0, Written::Anywhere, "{why}");
        };
        let told = event(Op::Write, Some((0, 5)));
        anywhere(&event(Op::Write, None), None, "a write without bytes");
        anywhere(
            &event(Op::Write, Some((5, u64::MAX))),
            None,
            "an exit that was missed",
        );
        anywhere(&event(Op::Fallocate, Some((5, 5))), None, "a range that is empty");
        for op in [Op::Truncate, Op::Create, Op::Unlink, Op::Rename, Op::Link] {
            let mut also = told.clone();
            also.also.insert(op);
            anywhere(&also, Some(&entry(&[[0, 5]])), op.name());
            anywhere(&event(op, Some((5, 5))), None, op.name());
        }
        let unknown = Dirty {
            range_unknown: 1,
            ..entry(&[[0, 5]])
        };
        anywhere(&told, Some(&unknown), "an entry that knows not all");
        let busy = Dirty {
            writers: 1,
            ..entry(&[[0, 5]])
        };
        anywhere(&told, Some(&busy), "an entry that is being widened");
        let mapped = Event { mapped: true, ..told };
        assert_eq!(written(&mapped, None), (Written::Anywhere, false));
    }
}
