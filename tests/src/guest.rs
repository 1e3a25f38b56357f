//! Guests for tests: one kernel booted, one command or one piece of the test's
//! own code run inside, everything shown when it fails.
//!
//! ```no_run
//! use omirr_tests::guest;
//!
//! // A command:
//! let printed = guest::output(guest::new("6.1"), &["uname", "-r"]);
//! assert!(printed.starts_with("6.1."));
//!
//! // The body of a test; it may use the whole of this crate inside:
//! guest::inside("6.1", |guest| guest.memory_mib(2048), || {
//!     assert!(std::fs::read_to_string("/proc/version").unwrap().contains("6.1."));
//! });
//! ```
//!
//! Such a guest has omirr in its `PATH` (and in `OMIRR_BIN`), the module `veth`
//! loaded, and an empty ext4 file system of 1 GiB on `/mnt`.

use std::env;

pub use xtask::guest::qemu::End;
pub use xtask::guest::{Disk, Guest, Outcome, Streams};
pub use xtask::kernel::{Kernel, NAMES as KERNELS};

const INSIDE: &str = "OMIRR_INSIDE_GUEST";
const TEST: &str = "/usr/local/bin/guest-test";
const OMIRR: &str = "/usr/local/bin/omirr";

/// A guest with that kernel, fitted out as the module's text says.
///
/// # Panics
/// The kernel or a binary is missing; the text says what to run.
#[must_use]
pub fn new(kernel: &str) -> Guest {
    let kernel = Kernel::find(kernel).unwrap_or_else(|error| panic!("{error:#}"));
    let init = super::beside_this_test("guest-init");
    assert!(
        init.exists(),
        "{} does not exist; run `cargo xtask test`",
        init.display()
    );
    Guest::new(kernel, &init)
        .program_at(&super::binary(), OMIRR)
        .env("OMIRR_BIN", OMIRR)
        .module("veth")
        .disk(Disk::ext4(1024, "/mnt"))
}

/// Runs the command and returns what it printed.
///
/// # Panics
/// It fails in any way; the text then has the end of the guest's log.
#[must_use]
pub fn output(guest: Guest, command: &[&str]) -> String {
    let outcome = run(guest, command);
    assert!(outcome.code() == Some(0), "{}", outcome.describe());
    outcome.output
}

/// Runs the command and returns how that ended.
///
/// # Panics
/// The guest cannot be put together or QEMU not be started.
#[must_use]
pub fn run(guest: Guest, command: &[&str]) -> Outcome {
    guest.run(command).unwrap_or_else(|error| panic!("{error:#}"))
}

/// Why guests cannot be booted here, if `cargo xtask test` found so.
#[must_use]
pub fn unavailable() -> Option<String> {
    env::var("OMIRR_SKIP_GUESTS").ok()
}

/// Runs `body` inside a guest. To be called by a `#[test]` function as all that
/// it does: the guest runs this same test program, asking for this same test,
/// and there `body` is what runs.
///
/// `body` must be a closure written in the test function itself, for that is how
/// the test's name is known. `fit` adds to the guest of [`new`].
///
/// # Panics
/// `body` panics inside, or the guest does not live to tell.
pub fn inside<B: FnOnce()>(kernel: &str, fit: impl FnOnce(Guest) -> Guest, body: B) {
    if env::var_os(INSIDE).is_some() {
        return body();
    }
    let test = test_name::<B>();
    if let Some(reason) = unavailable() {
        return super::skip(test, &reason);
    }
    let program = env::current_exe().expect("a running program has a path");
    let file = program
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    // Without the hash that cargo appends.
    let file = file.rsplit_once('-').map_or(file.as_str(), |(name, _)| name);
    let guest = new(kernel)
        .name(&format!("{file}-{}-{kernel}", test.replace("::", "-")))
        .program_at(&program, TEST)
        .env(INSIDE, "1")
        .env("RUST_BACKTRACE", "1");
    let outcome = run(
        fit(guest),
        &[TEST, "--exact", test, "--nocapture", "--test-threads=1"],
    );
    // A name that matches no test would "pass" too.
    let ran = outcome.output.contains("1 passed");
    assert!(
        outcome.code() == Some(0) && ran,
        "{test} in a guest with kernel {kernel}: {}",
        outcome.describe()
    );
}

/// `binary::module::test::{{closure}}` without its ends.
fn test_name<B>() -> &'static str {
    let path = std::any::type_name::<B>();
    let path = path.split_once("::{{closure}}").map_or(path, |(test, _)| test);
    path.split_once("::").map_or(path, |(_, test)| test)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_closure_tells_the_name_of_its_test() {
        fn name_of<B: FnOnce()>(_: B) -> &'static str {
            super::test_name::<B>()
        }
        assert_eq!(
            name_of(|| ()),
            "guest::tests::a_closure_tells_the_name_of_its_test"
        );
    }
}
