//! Which symbols a shared library defines, read from its ELF tables.

/// Whether a symbol whose name begins so is defined; `None` where this is no ELF file of 64 bits, little end first.
pub(crate) fn defines(file: &[u8], begin: &[u8]) -> Option<bool> {
    if file.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let half = |at: usize| Some(u16::from_le_bytes(file.get(at..at + 2)?.try_into().ok()?));
    let word = |at: usize| Some(u32::from_le_bytes(file.get(at..at + 4)?.try_into().ok()?));
    let long = |at: usize| usize::try_from(u64::from_le_bytes(file.get(at..at + 8)?.try_into().ok()?)).ok();
    let (table, entry, entries) = (long(0x28)?, usize::from(half(0x3a)?), usize::from(half(0x3c)?));
    let section = |index: usize| -> Option<(u32, usize, usize, usize)> {
        let at = table.checked_add(index.checked_mul(entry)?)?;
        Some((word(at + 4)?, long(at + 0x18)?, long(at + 0x20)?, word(at + 0x28)? as usize))
    };
    const DYNAMIC_SYMBOLS: u32 = 11;
    const SYMBOL: usize = 24;
    for index in 0..entries {
        let (kind, start, length, link) = section(index)?;
        if kind != DYNAMIC_SYMBOLS {
            continue;
        }
        let (_, names, _, _) = section(link)?;
        for symbol in (start..start.checked_add(length)?).step_by(SYMBOL) {
            let defined = half(symbol + 6)? != 0;
            let name = names.checked_add(word(symbol)? as usize)?;
            if defined && file.get(name..)?.starts_with(begin) {
                return Some(true);
            }
        }
        return Some(false);
    }
    None
}
