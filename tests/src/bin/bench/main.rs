//! What `cargo xtask bench` runs: omirr and what one would use instead, in one
//! run on this machine.
//!
//! In: which rows, tools and rounds. Out: a line of JSON for each measurement,
//! and a report with plots that follows from these lines alone. All tools do one
//! round before any does the next. Whatever a tool leaves at B is compared with
//! A, outside of the timed part.
//!
//! - [`rows`]: what is measured. [`tools`]: with whom. [`bench`]: on what ground.
//! - [`process`], [`wire`], [`trees`]: what is counted, and judged.
//! - [`raw`], [`figures`], [`report`], [`plot`]: what becomes of it.
//! - [`stop`]: Ctrl-C and limits. [`machine`]: where it ran. [`choice`]: the
//!   command line.

mod bench;
mod choice;
mod drive;
mod figures;
mod machine;
mod plot;
mod process;
mod raw;
mod report;
mod rows;
mod stop;
mod tools;
mod trees;
mod wire;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let result = choice::Options::parse().choose().and_then(|choice| {
        if choice.report_only {
            return report::write(&choice.into);
        }
        match drive::run(&choice) {
            // What was measured until then is worth a report.
            Err(error) if error.is::<bench::NoRoom>() => report::write(&choice.into).and(Err(error)),
            result => result.and_then(|()| report::write(&choice.into)),
        }
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            xtask::shell::complain(&error);
            ExitCode::FAILURE
        }
    }
}
