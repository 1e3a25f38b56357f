//! The process that makes the changes, and the orders that it takes.
//!
//! In: `prepare N`, `act`, `write-back`, `release`, each with the place and the
//! row's folder. Out: `done MARK` (`CLOCK_MONOTONIC`, ns: the change is complete
//! no earlier), `lacking REASON` or `failed REASON`. What a row holds (open
//! files, mappings) lives from `prepare` to `release`.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::rows::{self, Held, Lacking, Stage};
use crate::sys;

/// No order takes anywhere near that long.
const PATIENCE: Timespec = Timespec {
    tv_sec: 60,
    tv_nsec: 0,
};

/// The parent's end.
pub struct Changer {
    process: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

pub enum Answer {
    Done(u64),
    /// This kernel or filesystem has no such change.
    Lacking(String),
}

impl Changer {
    pub fn start() -> Result<Self> {
        let mut process = Command::new("/proc/self/exe")
            .arg("changer")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("the changer cannot be started")?;
        let orders = process.stdin.take().context("stdin is piped")?;
        let answers = BufReader::new(process.stdout.take().context("stdout is piped")?);
        Ok(Self {
            process,
            orders,
            answers,
        })
    }

    pub fn ask(&mut self, order: &str, stage: &Stage) -> Result<Answer> {
        writeln!(self.orders, "{order}\t{}", serde_json::to_string(stage)?)?;
        let mut ready = [PollFd::new(self.answers.get_ref(), PollFlags::IN)];
        if poll(&mut ready, Some(&PATIENCE))? == 0 {
            bail!(
                "{order}: no answer within {} s; the changer is at {}",
                PATIENCE.tv_sec,
                self.whereabouts()
            );
        }
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        match answer.trim_end().split_once(' ') {
            Some(("done", mark)) => Ok(Answer::Done(mark.parse()?)),
            Some(("lacking", reason)) => Ok(Answer::Lacking(reason.to_owned())),
            _ => bail!("{order}: {answer}"),
        }
    }
}

impl Changer {
    /// Where its threads are in the kernel.
    fn whereabouts(&self) -> String {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.process.id()));
        let stacks = tasks.into_iter().flatten().flatten();
        let stacks = stacks.filter_map(|task| std::fs::read_to_string(task.path().join("stack")).ok());
        stacks.collect::<Vec<_>>().join("; ").replace('\n', " ")
    }
}

impl Drop for Changer {
    fn drop(&mut self) {
        // It ends by itself when its orders end; if it is gone already, the
        // reason has been told by `ask`.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

/// The child's end.
pub fn serve() -> Result<()> {
    let rows = rows::all();
    let (mut row, mut held) = (0, Held::default());
    let mut answers = std::io::stdout();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (order, stage) = line.split_once('\t').context("an order has a stage")?;
        let stage: Stage = serde_json::from_str(stage)?;
        let began = sys::now();
        held.mark = None;
        let outcome = match order.split_once(' ').unwrap_or((order, "")) {
            ("prepare", number) => {
                row = number.parse()?;
                held = Held::default();
                std::fs::create_dir_all(&stage.dir)?;
                (rows[row].prepare)(&stage, &mut held)
            }
            ("act", _) => (rows[row].act)(&stage, &mut held),
            ("write-back", _) => sys::syncfs(&stage.seen_as()),
            ("release", _) => {
                held = Held::default();
                Ok(())
            }
            _ => bail!("unknown order {order}"),
        };
        match outcome {
            Ok(()) => writeln!(answers, "done {}", held.mark.unwrap_or(began))?,
            Err(error) => match error.downcast_ref::<Lacking>() {
                Some(Lacking(reason)) => writeln!(answers, "lacking {reason}")?,
                None => writeln!(answers, "failed {}", format!("{error:#}").replace('\n', " "))?,
            },
        }
    }
    Ok(())
}
