//! The folders in which the rows happen, with what must be mounted for them.
//!
//! In: an empty folder on each filesystem of a disk. Out: a share and a folder
//! beside it on each, on a tmpfs, and an overlayfs whose upper directory is a
//! share on the first. Nothing is unmounted: the guest ends with the program.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use omirr::source::Watch;
use rustix::mount::{MountFlags, mount};
use serde::{Deserialize, Serialize};

use crate::elsewhere::COPIED_UP;
use crate::rows;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Place {
    /// The filesystem's type; `overlay` for an upper directory.
    pub name: String,
    /// Where changes are made.
    pub changes: PathBuf,
    /// What is watched: the same folder, or the upper directory.
    pub share: PathBuf,
    /// A folder beside the share on the same filesystem.
    pub outside: Option<PathBuf>,
    /// The share as an NFS client sees it, or why there is none.
    pub nfs: Result<PathBuf, String>,
}

impl Place {
    pub fn watch(&self) -> Result<Watch> {
        let meta = self
            .share
            .metadata()
            .with_context(|| self.share.display().to_string())?;
        Ok(Watch {
            path: self.share.clone(),
            dev: meta.dev(),
            ino: meta.ino(),
        })
    }
}

/// How often a row is done until no event is lost. Where a kernel preempts
/// itself, an `fentry` program is passed over now and then.
pub const ATTEMPTS: usize = 4;

/// What a row's folder is called.
pub fn row_folder(number: usize, pass: usize, attempt: usize) -> String {
    format!("{number}-{pass}-{attempt}")
}

pub fn prepare(folders: &[&str]) -> Result<Vec<Place>> {
    let mut places = Vec::new();
    for folder in folders {
        let (name, folder) = folder
            .split_once('=')
            .with_context(|| format!("{folder}: FILESYSTEM=FOLDER"))?;
        places.push(plain(name, Path::new(folder))?);
    }
    let memory = Path::new("/run/coverage-tmpfs");
    fs::create_dir_all(memory)?;
    mount("tmpfs", memory, "tmpfs", MountFlags::empty(), None).context("tmpfs")?;
    places.push(plain("tmpfs", memory)?);
    if let Some(("ext4", folder)) = folders.first().and_then(|folder| folder.split_once('=')) {
        places.push(overlay(&Path::new(folder).join("overlay"))?);
    }
    crate::nfs::export(&mut places);
    Ok(places)
}

fn plain(name: &str, folder: &Path) -> Result<Place> {
    let (share, outside) = (folder.join("share"), folder.join("outside"));
    fs::create_dir_all(&share).with_context(|| share.display().to_string())?;
    fs::create_dir_all(&outside)?;
    Ok(Place {
        name: name.to_owned(),
        changes: share.clone(),
        share,
        outside: Some(outside),
        nfs: Err(String::new()),
    })
}

fn overlay(folder: &Path) -> Result<Place> {
    let at = |name: &str| folder.join(name);
    for name in ["lower", "upper", "work", "merged"] {
        fs::create_dir_all(at(name))?;
    }
    // The files that are copied up must be there before it is mounted.
    for (number, _) in rows::all()
        .iter()
        .enumerate()
        .filter(|(_, row)| row.name == COPIED_UP)
    {
        for (pass, attempt) in (0..2).flat_map(|pass| (0..ATTEMPTS).map(move |attempt| (pass, attempt))) {
            let row = at("lower").join(row_folder(number, pass, attempt));
            fs::create_dir_all(&row)?;
            fs::write(row.join("f"), rows::BEFORE)?;
        }
    }
    let options = ["lower", "upper", "work"]
        .map(|name| format!("{name}dir={}", at(name).display()))
        .join(",");
    let options = std::ffi::CString::new(options)?;
    mount(
        "overlay",
        at("merged"),
        "overlay",
        MountFlags::empty(),
        Some(options.as_c_str()),
    )
    .context("overlay")?;
    Ok(Place {
        name: "overlay".to_owned(),
        changes: at("merged"),
        share: at("upper"),
        outside: None,
        nfs: Err("overlayfs is not exported by default".to_owned()),
    })
}
