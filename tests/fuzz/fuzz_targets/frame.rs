//! Frames as they come off a connection, cut at any place.
//!
//! In: the first byte says how much arrives at once, the rest arrives. What is
//! found must not depend on where it was cut.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use omirr::wire::frame::{self, Progress};

fn frames(portions: &mut dyn Iterator<Item = &[u8]>) -> (Vec<(u8, Vec<u8>)>, Option<String>) {
    let mut buffer = BytesMut::new();
    let mut found = Vec::new();
    for portion in portions {
        buffer.extend_from_slice(portion);
        loop {
            match frame::take(&mut buffer) {
                Ok(Progress::Whole(frame)) => found.push((frame.flags, frame.body.to_vec())),
                Ok(Progress::Missing(bytes)) => {
                    assert!(bytes > 0);
                    break;
                }
                Err(error) => return (found, Some(error.to_string())),
            }
        }
    }
    (found, None)
}

fuzz_target!(|data: &[u8]| {
    let Some((portion, data)) = data.split_first() else {
        return;
    };
    let cut = frames(&mut data.chunks(usize::from(*portion) + 1));
    assert_eq!(cut, frames(&mut std::iter::once(data)));
    // What was taken off can be put on again.
    let mut again = BytesMut::new();
    for (flags, body) in &cut.0 {
        frame::put(*flags, body, &mut again).expect("it came from a frame");
    }
    assert_eq!(again[..], data[..again.len()]);
});
