//! Prints the rows of a share's index, for whoever looks for a mistake in it:
//! `cargo run --example index_dump -- STATE_DIR/SHARE.redb [PATH]`. The daemon
//! must not be running: the index has one user at a time.

use std::io::Write;

use omirr::index::Index;
use omirr::model::RelPath;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args_os().skip(1);
    let file = args
        .next()
        .ok_or_else(|| anyhow::anyhow!("the first argument is the index file"))?;
    let only = args.next().map(|path| path.to_string_lossy().into_owned());
    let mut out = std::io::stdout().lock();
    let index = Index::open(file.as_ref(), "nobody")?;
    let reader = index.read()?;
    let root = reader
        .get(&RelPath::root())?
        .map(|record| Ok((RelPath::root(), record)));
    for pair in root.into_iter().chain(reader.beneath(&RelPath::root())?) {
        let (path, record) = pair?;
        let shown = path.to_string();
        if only
            .as_ref()
            .is_some_and(|only| !shown.starts_with(only.as_str()))
        {
            continue;
        }
        writeln!(
            out,
            "{} {shown} seq {} via {:?} ino {:?} racy {:?}",
            if record.row.deleted { "gone" } else { "live" },
            record.seq,
            record.via,
            record.sig.map(|sig| sig.ino),
            record.sig.map(|sig| sig.racy),
        )?;
        writeln!(out, "     {:?}", record.row.version)?;
        writeln!(out, "     {:?}", record.row.entry)?;
    }
    Ok(())
}
