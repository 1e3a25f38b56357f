//! What `cargo xtask bench` runs: omirr beside rsync on this machine, in one
//! run, on the source tree of Linux.
//!
//! Prints a table in Markdown. Rounds alternate between the two tools, every
//! copy goes to a fresh folder, nothing is deleted before the end (for minutes
//! after a deletion ext4 passes over the inodes that became free, which makes
//! every new file dear: `recently_deleted` in fs/ext4/ialloc.c), and medians are
//! given with the least and the most.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use omirr_tests::nodes::{Pair, free_port};

#[derive(Parser)]
struct Args {
    /// Rounds of the tree's arrival.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Files written for the latency.
    #[arg(long, default_value_t = 300)]
    files: usize,
    /// The tree to use instead of Linux' own: a folder.
    #[arg(long)]
    tree: Option<PathBuf>,
}

const LONG: Duration = Duration::from_secs(600);

fn run(command: &mut Command) {
    let out = command.output().expect("the command can be started");
    assert!(
        out.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
}

struct RsyncDaemon(Child);

impl Drop for RsyncDaemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn rsync_daemon(base: &Path, tree: &Path, port: u16) -> RsyncDaemon {
    let config = base.join("rsyncd.conf");
    let text = format!(
        "use chroot = no\nuid = 0\ngid = 0\n[tree]\npath = {}\nread only = yes\n",
        tree.display()
    );
    fs::write(&config, text).expect("the folder can be written");
    let child = Command::new("rsync")
        .args(["--daemon", "--no-detach", "--address=127.0.0.1"])
        .arg(format!("--port={port}"))
        .arg(format!("--config={}", config.display()))
        .stdin(Stdio::null())
        .spawn()
        .expect("rsync can be started");
    let deadline = Instant::now() + Duration::from_secs(10);
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < deadline, "the rsync daemon does not listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    RsyncDaemon(child)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn spread(values: &[f64], unit: &str) -> String {
    let mut sorted = values.to_vec();
    let middle = median(&mut sorted);
    format!(
        "{middle:.2} {unit} ({:.2} to {:.2}, n = {})",
        sorted[0],
        sorted[sorted.len() - 1],
        sorted.len()
    )
}

fn main() {
    let args = Args::parse();
    let base = match std::env::var_os("OMIRR_TEST_DIR") {
        Some(folder) => tempfile::tempdir_in(folder),
        None => tempfile::tempdir(),
    }
    .expect("a folder for the run can be made");
    let tree = args.tree.unwrap_or_else(|| {
        let archive = Path::new("/usr/src/linux-source-6.1.tar.xz");
        assert!(
            archive.exists(),
            "{} is missing: run `cargo xtask setup`",
            archive.display()
        );
        eprintln!("unpacking {}", archive.display());
        run(Command::new("tar")
            .arg("-xJf")
            .arg(archive)
            .arg("-C")
            .arg(base.path()));
        let inner = fs::read_dir(base.path())
            .expect("the folder is there")
            .next()
            .expect("tar made a folder");
        inner.expect("the folder can be read").path()
    });
    let port = free_port();
    let _daemon = rsync_daemon(base.path(), &tree, port);
    let (mut rsync_s, mut omirr_s, mut live_s) = (Vec::new(), Vec::new(), Vec::new());
    let mut entries = 0;
    let (mut latency_ms, mut restart_s, mut rest) = (Vec::new(), Vec::new(), Vec::new());
    // Nothing is deleted before the end.
    let mut done = Vec::new();
    for round in 1..=args.rounds {
        eprintln!("round {round} of {}: rsync", args.rounds);
        let copy = base.path().join(format!("rsync-{round}"));
        rustix::fs::sync();
        let started = Instant::now();
        run(Command::new("rsync")
            .arg("-a")
            .arg(format!("rsync://127.0.0.1:{port}/tree/"))
            .arg(&copy));
        rsync_s.push(started.elapsed().as_secs_f64());

        eprintln!(
            "round {round} of {}: omirr, a tree that is there to an empty node",
            args.rounds
        );
        let mut pair = Pair::new();
        run(Command::new("cp")
            .arg("-a")
            .arg(tree.join("."))
            .arg(&pair.one.share));
        pair.one.start();
        let deadline = Instant::now() + LONG;
        let mut before = 0;
        loop {
            let now = pair
                .one
                .status()
                .map_or(0, |status| status["shares"][0]["entries"].as_u64().unwrap_or(0));
            if now > 1000 && now == before {
                break;
            }
            before = now;
            assert!(
                Instant::now() < deadline,
                "the tree is never indexed\n{}",
                pair.one.log_tail()
            );
            std::thread::sleep(Duration::from_millis(500));
        }
        entries = before;
        rustix::fs::sync();
        let started = Instant::now();
        pair.two.start();
        pair.one.settle(LONG);
        omirr_s.push(started.elapsed().as_secs_f64());
        pair.settle_equal(LONG);

        eprintln!("round {round} of {}: 4 KiB files, one at a time", args.rounds);
        let (here, there) = (pair.one.share.join("latency"), pair.two.share.join("latency"));
        fs::create_dir(&here).expect("the share can be written");
        pair.settle(LONG);
        for n in 0..args.files / args.rounds {
            let name = format!("{n}");
            let content = vec![u8::try_from(n % 251).unwrap_or(0); 4096];
            let started = Instant::now();
            fs::write(here.join(&name), &content).expect("the share can be written");
            while fs::read(there.join(&name)).map_or(true, |read| read != content) {
                assert!(
                    started.elapsed() < LONG,
                    "{name} never arrives\n{}",
                    pair.two.log_tail()
                );
                std::thread::yield_now();
            }
            latency_ms.push(started.elapsed().as_secs_f64() * 1000.0);
            std::thread::sleep(Duration::from_millis(20));
        }
        pair.settle_equal(LONG);

        eprintln!("round {round} of {}: a restart with nothing to do", args.rounds);
        pair.one.stop();
        pair.two.stop();
        let started = Instant::now();
        pair.start();
        pair.settle(LONG);
        restart_s.push(started.elapsed().as_secs_f64());
        std::thread::sleep(Duration::from_secs(6));
        rest.push(pair.one.resident_bytes().max(pair.two.resident_bytes()));
        pair.one.stop();
        pair.two.stop();
        done.push(pair);

        eprintln!(
            "round {round} of {}: omirr, a tree copied into a running share",
            args.rounds
        );
        let mut pair = Pair::new();
        pair.start();
        pair.settle(LONG);
        rustix::fs::sync();
        let started = Instant::now();
        run(Command::new("cp")
            .arg("-a")
            .arg(tree.join("."))
            .arg(&pair.one.share));
        pair.one.settle(LONG);
        live_s.push(started.elapsed().as_secs_f64());
        pair.settle_equal(LONG);
        pair.one.stop();
        pair.two.stop();
        done.push(pair);
    }
    let rsync = median(&mut rsync_s.clone());
    let omirr = median(&mut omirr_s.clone());
    let worst = rest.iter().copied().max().unwrap_or(0);
    let per_entry = (worst as f64 - f64::from(30 << 20)) / entries as f64;
    println!("| what | measured |");
    println!("| --- | --- |");
    println!("| entries in the tree | {entries} |");
    println!(
        "| `rsync -a` from an rsync daemon on loopback | {} |",
        spread(&rsync_s, "s")
    );
    println!(
        "| omirr, the same tree to an empty node, durable | {} |",
        spread(&omirr_s, "s")
    );
    println!("| ratio of the medians (floor: 1.5) | {:.2} |", omirr / rsync);
    println!(
        "| omirr, `cp -a` into a running share until durable on the peer | {} |",
        spread(&live_s, "s")
    );
    println!(
        "| a 4 KiB file written here, read there (floor: 10 ms) | {} |",
        spread(&latency_ms, "ms")
    );
    println!(
        "| restart of both, nothing to do (floor: 3 s) | {} |",
        spread(&restart_s, "s")
    );
    println!(
        "| memory at rest, the larger node (floor: 400 bytes an entry above 30 MB) | {:.1} MB, {per_entry:.0} bytes an entry above 30 MB |",
        worst as f64 / f64::from(1 << 20)
    );
}
