//! Whole frames with messages, compressed or not: decoded, checked, and if they
//! pass encoded again to the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use omirr::wire;

fuzz_target!(|data: &[u8]| {
    let Ok(message) = wire::decode(data) else {
        return;
    };
    // What passes can be sent on, unless a limit of the sender is narrower.
    if let Ok(again) = wire::encode(&message) {
        assert_eq!(wire::decode(&again).as_ref(), Ok(&message));
    }
});
