//! Content that changes by a store through a shared mapping. The first store to
//! a page faults, and the fault comes before the store; the next ones are seen
//! by nobody until the page is written back or the mapping ends.

use anyhow::Result;

use crate::data;
use crate::rows::{Held, Stage};
use crate::sys::{self, Mapping};

fn map(stage: &Stage, held: &mut Held) -> Result<()> {
    data::file(stage, held)?;
    let file = data::open(&stage.dir.join("f"))?;
    held.maps.push(Mapping::of(&file)?);
    held.files.push(file);
    Ok(())
}

/// A store, after which the content is what must be seen.
fn store(held: &mut Held) {
    held.maps[0].store(b'm');
    held.mark = Some(sys::now());
}

pub fn first_store(stage: &Stage, held: &mut Held) -> Result<()> {
    let file = data::open(&stage.dir.join("f"))?;
    held.maps.push(Mapping::of(&file)?);
    held.files.push(file);
    store(held);
    Ok(())
}

pub fn store_and_sync(stage: &Stage, held: &mut Held) -> Result<()> {
    first_store(stage, held)?;
    held.maps[0].sync()
}

pub fn mapped_and_closed(stage: &Stage, held: &mut Held) -> Result<()> {
    map(stage, held)?;
    held.files.clear();
    Ok(())
}

pub fn store_and_unmap(_: &Stage, held: &mut Held) -> Result<()> {
    store(held);
    held.maps.clear();
    Ok(())
}

/// The page is writable and dirty: the next store does not fault.
pub fn touched(stage: &Stage, held: &mut Held) -> Result<()> {
    map(stage, held)?;
    held.maps[0].store(b't');
    Ok(())
}

pub fn touched_and_closed(stage: &Stage, held: &mut Held) -> Result<()> {
    touched(stage, held)?;
    held.files.clear();
    Ok(())
}

pub fn late_store(_: &Stage, held: &mut Held) -> Result<()> {
    store(held);
    Ok(())
}
