//! A kernel's modules: which files a wanted module needs, in loading order.
//!
//! Packages carry no `modules.dep`, which is made when they are installed; so
//! the dependencies are read from the modules themselves.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::shell::output;

/// The modules of one release.
pub struct Modules {
    files: HashMap<String, PathBuf>,
    /// None where the package does not list them.
    built_in: Option<Vec<String>>,
}

/// A module, ready to be loaded.
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// The modules that must be loaded before.
    pub depends: Vec<String>,
    /// The object, decompressed.
    pub object: Vec<u8>,
}

impl Modules {
    /// Lists the release's folder.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn open(folder: &Path) -> Result<Self> {
        let mut files = HashMap::new();
        collect(folder, &mut files).with_context(|| format!("{} cannot be read", folder.display()))?;
        let built_in = fs::read_to_string(folder.join("modules.builtin"))
            .ok()
            .map(|text| text.lines().filter_map(|line| name_of(Path::new(line))).collect());
        Ok(Self { files, built_in })
    }

    /// The wanted modules and all that they need, in loading order; those that
    /// are part of the kernel are left out.
    ///
    /// # Errors
    /// The kernel has no such module, or it cannot be read.
    pub fn with_dependencies(&self, wanted: &[String]) -> Result<Vec<Module>> {
        let mut ordered = Vec::new();
        for name in wanted {
            self.add(&name.replace('-', "_"), &mut ordered)?;
        }
        Ok(ordered)
    }

    fn add(&self, name: &str, ordered: &mut Vec<Module>) -> Result<()> {
        if ordered.iter().any(|module| module.name == name) {
            return Ok(());
        }
        let Some(path) = self.files.get(name) else {
            // Without a list there is no telling; the guest will notice.
            if self
                .built_in
                .as_ref()
                .is_none_or(|built_in| built_in.iter().any(|other| other == name))
            {
                return Ok(());
            }
            bail!("this kernel has no module {name}");
        };
        let object = read(path)?;
        let depends = dependencies(&object);
        for other in &depends {
            self.add(other, ordered)?;
        }
        ordered.push(Module {
            name: name.to_owned(),
            depends,
            object,
        });
        Ok(())
    }
}

fn collect(folder: &Path, files: &mut HashMap<String, PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), files)?;
        } else if let Some(name) = name_of(&entry.path()) {
            files.insert(name, entry.path());
        }
    }
    Ok(())
}

/// `…/dm-flakey.ko.xz` is the module `dm_flakey`.
fn name_of(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let (stem, rest) = file.split_once(".ko")?;
    ["", ".xz", ".zst", ".gz"]
        .contains(&rest)
        .then(|| stem.replace('-', "_"))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let tool = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(path).with_context(|| format!("{} cannot be read", path.display())),
    };
    let result = output(Command::new(tool).arg("-dc").arg(path))?;
    if !result.status.success() {
        bail!(
            "{tool} cannot decompress {}: {}",
            path.display(),
            String::from_utf8_lossy(&result.stderr).trim()
        );
    }
    Ok(result.stdout)
}

/// The `depends=a,b` string in a module's `.modinfo` section.
fn dependencies(object: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = object.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = &object[start + KEY.len()..];
    let value = &value[..value.iter().position(|byte| *byte == 0).unwrap_or(0)];
    String::from_utf8_lossy(value)
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_the_object() {
        assert_eq!(
            dependencies(b"x\0license=GPL\0depends=libcrc32c,dm-mod\0name=y\0"),
            ["libcrc32c", "dm_mod"]
        );
        assert!(dependencies(b"\0depends=\0name=y\0").is_empty());
        assert!(dependencies(b"").is_empty());
    }

    #[test]
    fn a_module_is_named_by_its_file() {
        assert_eq!(
            name_of(Path::new("a/dm-flakey.ko.xz")).as_deref(),
            Some("dm_flakey")
        );
        assert_eq!(name_of(Path::new("a/veth.ko")).as_deref(), Some("veth"));
        assert_eq!(name_of(Path::new("a/modules.order")), None);
    }

    #[test]
    fn modules_come_after_what_they_need() {
        let folder = std::env::temp_dir().join(format!("omirr-modules-{}", std::process::id()));
        fs::create_dir_all(folder.join("kernel")).unwrap();
        fs::write(folder.join("kernel/top.ko"), b"\0depends=low-part,inside\0").unwrap();
        fs::write(folder.join("kernel/low-part.ko"), b"\0depends=\0").unwrap();
        fs::write(folder.join("modules.builtin"), "kernel/inside.ko\n").unwrap();
        let modules = Modules::open(&folder).unwrap();
        let names: Vec<String> = modules
            .with_dependencies(&["top".to_owned()])
            .unwrap()
            .into_iter()
            .map(|module| module.name)
            .collect();
        let missing = modules
            .with_dependencies(&["gone".to_owned()])
            .err()
            .map(|error| error.to_string());
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(names, ["low_part", "top"]);
        assert_eq!(missing.as_deref(), Some("this kernel has no module gone"));
    }
}
