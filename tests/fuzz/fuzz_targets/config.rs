//! Configuration files: mistakes are told, with lines that the file has.
#![no_main]

use libfuzzer_sys::fuzz_target;
use omirr::config::Config;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Err(mistakes) = Config::parse(text) {
        assert!(!mistakes.is_empty());
        let lines = text.split('\n').count();
        for mistake in mistakes {
            assert!(mistake.line.is_none_or(|line| (1..=lines).contains(&line)));
            assert!(!mistake.text.is_empty());
        }
    }
});
