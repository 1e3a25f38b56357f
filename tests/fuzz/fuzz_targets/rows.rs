//! The body of a batch of rows, and a record as the index keeps it.
//!
//! What passes the checks keeps what the rest of the daemon relies on.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use omirr::model::Record;
use omirr::wire::{self, Message, frame};

/// The number of `Message::Batch`.
const BATCH: u8 = 3;

fuzz_target!(|data: &[u8]| {
    if let Ok(record) = wire::from_bytes::<Record>(data) {
        let bytes = wire::to_bytes(&record).expect("it was decoded");
        assert_eq!(wire::from_bytes::<Record>(&bytes).as_ref(), Ok(&record));
    }
    let mut body = vec![BATCH];
    body.extend_from_slice(data);
    let mut whole = BytesMut::new();
    if frame::put(0, &body, &mut whole).is_err() {
        return;
    }
    let Ok(Message::Batch { upto, rows }) = wire::decode(&whole) else {
        return;
    };
    for row in &rows {
        let path = row.path.as_bytes();
        assert!(path.len() <= 4095 && !path.contains(&0) && !path.starts_with(b"/"));
        for name in row.path.names() {
            assert!(!name.is_empty() && name.len() <= 255);
            assert!(name != b"." && name != b".." && !name.starts_with(b".omirr-tmp-"));
        }
        assert!(row.row.entry.mode <= 0o7777 && row.seq > 0);
        if let Some(inline) = &row.inline {
            let (size, _) = row.row.entry.content().expect("only files have content");
            assert!(inline.len() as u64 == size && !row.row.deleted);
        }
    }
    let message = Message::Batch { upto, rows };
    if let Ok(again) = wire::encode(&message) {
        assert_eq!(wire::decode(&again).as_ref(), Ok(&message));
    }
});
