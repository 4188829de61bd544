//! Owns: many files with size and checksum in little memory.
//! Does not own: what the files are. Pure.

use std::borrow::Cow;

use super::{ChecksumAlgorithm, FileChecksum, ManifestError, ManifestFile};
use crate::codec::tar::shown;

/// Files with size and checksum, compactly: a million of them take about 60 MiB.
#[derive(Clone, Debug, Default)]
pub struct FileTable {
    /// Path, then checksum, of each file.
    texts: Vec<u8>,
    rows: Vec<Row>,
    /// Indexes into `rows`, sorted by path.
    by_path: Vec<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Row {
    /// In `texts`.
    start: u64,
    path_bytes: u32,
    algorithm: ChecksumAlgorithm,
    size: u64,
}

impl FileTable {
    pub fn push(&mut self, path: &[u8], size: u64, checksum: &FileChecksum) {
        let row = Row {
            start: self.texts.len() as u64,
            path_bytes: u32::try_from(path.len()).expect("a path is at most a line, or a tar header, long"),
            algorithm: checksum.algorithm(),
            size,
        };
        self.texts.extend_from_slice(path);
        self.texts.extend_from_slice(checksum.as_bytes());
        self.rows.push(row);
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub fn path(&self, index: usize) -> &[u8] {
        let row = self.rows[index];
        &self.texts[row.start as usize..][..row.path_bytes as usize]
    }

    pub fn file(&self, index: usize) -> ManifestFile<'_> {
        let row = self.rows[index];
        let digest = &self.texts[row.start as usize + row.path_bytes as usize..][..row.algorithm.digest_bytes()];
        let checksum = FileChecksum::new(row.algorithm, digest);
        ManifestFile { path: Cow::Borrowed(self.path(index)), size: row.size, checksum }
    }

    pub fn iter(&self) -> impl Iterator<Item = ManifestFile<'_>> {
        (0..self.len()).map(|index| self.file(index))
    }

    /// Makes [`FileTable::find`] possible; nothing is pushed afterwards. A path that is there twice is an error.
    pub fn sort(&mut self) -> Result<(), ManifestError> {
        let count = u32::try_from(self.rows.len()).expect("memory holds fewer files than that");
        let mut by_path: Vec<u32> = (0..count).collect();
        by_path.sort_unstable_by(|&a, &b| self.path(a as usize).cmp(self.path(b as usize)));
        let same = |pair: &&[u32]| self.path(pair[0] as usize) == self.path(pair[1] as usize);
        if let Some(pair) = by_path.windows(2).find(same) {
            return Err(ManifestError::Duplicate { path: shown(self.path(pair[0] as usize)) });
        }
        self.by_path = by_path;
        Ok(())
    }

    /// The file of this path, in a table that was sorted.
    pub fn find(&self, path: &[u8]) -> Option<usize> {
        debug_assert_eq!(self.by_path.len(), self.rows.len(), "the table was sorted");
        let at = self.by_path.binary_search_by(|&index| self.path(index as usize).cmp(path)).ok()?;
        Some(self.by_path[at] as usize)
    }
}
